"""Stages built from checkpoints, and the assembled student."""

import pytest
import torch

from megatron_hypenet.checkpoint.load import read_manifest, read_model_config, read_weights
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.halo import build_stage
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.base import MicroBatch
from tests.tiny import tiny_model_config, tiny_teacher_config, whole_tensors
from tests.unit.halo.test_run_folder import config

TEACHER = tiny_teacher_config(3)
MIXERS = ("lightning_attn", "attn", "lightning_attn")


@pytest.fixture(scope="module")
def teacher():
    return build_model(TEACHER, ParallelConfig(), dtype=torch.float32, seed=0)


@pytest.fixture(scope="module")
def world(teacher, tmp_path_factory):
    """Provide a folder with a teacher checkpoint and the aligned mixers of all its layers."""
    root = tmp_path_factory.mktemp("stages")
    write_weights(
        root / "teacher",
        whole_tensors(teacher),
        TEACHER,
        kind="teacher",
        extra={"hf_config": {"model_type": "qwen3"}},
    )
    aligned = AlignedMixers.from_teacher(teacher, default_mixer(), seed=1)
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.add_(0.01)  # as if trained: not what a fresh transfer gives
    write_weights(root / "align", whole_tensors(aligned), aligned.model_config, kind="align")
    return root


@pytest.fixture(scope="module")
def assembled(world):
    build_stage.assemble(
        config(world), world / "teacher", world / "align", MIXERS, world / "student"
    )
    return world / "student"


def test_the_assembled_student_is_put_together_from_its_sources(world, assembled):
    student, teacher, aligned = (
        read_weights(folder) for folder in (assembled, world / "teacher", world / "align")
    )
    assert read_model_config(assembled) == TEACHER.with_mixers(MIXERS)
    assert read_manifest(assembled).kind == "student" and read_manifest(assembled).hf_config == {
        "model_type": "qwen3"
    }
    for name, tensor in student.items():
        if ".1.self_attention.linear_in.weight.gate" in name:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
        else:
            source = aligned if ".self_attention." in name and ".1." not in name else teacher
            assert torch.equal(tensor, source[name]), name


def test_stages_load_strictly_and_run(world, assembled):
    run = config(world)
    batch = MicroBatch(
        torch.randint(0, TEACHER.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    )
    for name, inputs in (
        ("align", {"teacher": world / "teacher"}),
        ("distill", {"teacher": world / "teacher", "init": assembled}),
        ("finetune", {"init": assembled}),
    ):
        stage = build_stage.build_stage(name, run, **inputs)
        assert stage.name == name
        loss, _ = stage(batch)
        loss.backward()
        assert loss.isfinite() and all(
            parameter.grad is not None for parameter in stage.trainable_parameters().values()
        )
        assert ("frozen" in build_stage.parameter_table(stage)) == (name != "finetune")


def test_a_student_claims_the_length_it_was_trained_on(world, assembled):
    claimed = TEACHER.max_position_embeddings
    for seq_length, want in ((claimed + 1, claimed + 1), (claimed - 1, claimed)):
        base = config(world)
        run = base.model_copy(
            update={"finetune": base.finetune.model_copy(update={"seq_length": seq_length})}
        )
        assert (
            build_stage.build_stage(
                "finetune", run, init=assembled
            ).model_config.max_position_embeddings
            == want
        )


def test_the_student_holds_what_was_assembled(world, assembled):
    student = build_stage.load_hypenet(config(world), assembled)
    stored = read_weights(assembled)
    for name, tensor in whole_tensors(student).items():
        assert torch.equal(tensor, stored[name]), name


def test_aligned_mixers_come_back(world, teacher):
    mixers = build_stage.load_aligned(teacher, world / "align")
    stored = read_weights(world / "align")
    for name, tensor in whole_tensors(mixers).items():
        assert torch.equal(tensor, stored[name]), name


def test_the_wrong_checkpoint_is_refused(world, assembled, tmp_path):
    run = config(world)
    with pytest.raises(CheckpointError, match="is not a teacher"):
        build_stage.build_stage("align", run, teacher=assembled)
    with pytest.raises(CheckpointError, match="is a teacher"):
        build_stage.build_stage("finetune", run, init=world / "teacher")
    with pytest.raises(CheckpointError, match="tensors of the model are not in it"):
        build_stage.load_hypenet(run, world / "align")


def test_teacher_and_student_share_a_vocabulary(world, tmp_path):
    other = tiny_model_config(MIXERS, vocab_size=67)
    write_weights(
        tmp_path / "other",
        whole_tensors(build_model(other, ParallelConfig(), dtype=torch.float32)),
        other,
        kind="student",
    )
    with pytest.raises(CheckpointError, match="vocab_size=61, student .* 67"):
        build_stage.build_stage(
            "distill", config(world), teacher=world / "teacher", init=tmp_path / "other"
        )


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_precision_on_a_cpu(tmp_path, precision, dtype):
    assert build_stage.compute_dtype(config(tmp_path, precision=precision)) == dtype
