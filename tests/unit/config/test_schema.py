import ast
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.problems import section_type
from megatron_hypenet.config.schema import (
    STAGES,
    AlignConfig,
    FinetuneConfig,
    HeadStageConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)
from tests import toy_mixer

STAGE = {
    "train_iters": 10,
    "seq_length": 64,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "lr": 1e-3,
    "min_lr": 1e-5,
}
RUN = {
    "output_dir": "runs/x",
    "teacher": "t",
    "data": {"train": ["a.txt"]},
    "align": STAGE,
    "distill": STAGE,
    "finetune": STAGE,
}


def sections(root: type[BaseModel]):
    yield root
    for field in root.model_fields.values():
        below = section_type(field.annotation)
        if below is not None:
            yield from sections(below)


def test_smallest_run_has_all_sections():
    run = RunConfig.model_validate(RUN)
    assert run.data.train == (Path("a.txt"),)
    assert run.parallel == ParallelConfig()
    assert [type(run.stage(name)) for name in STAGES] == [
        AlignConfig,
        HeadStageConfig,
        FinetuneConfig,
    ]
    assert run.eval.length_multiples == (1, 2, 4, 8)


def test_unknown_stage_names_the_known_ones():
    with pytest.raises(KeyError, match="align, distill, finetune"):
        RunConfig.model_validate(RUN).stage("select")


@pytest.mark.parametrize("section", list(sections(RunConfig)), ids=lambda cls: cls.__name__)
def test_every_section_is_strict_and_documented(section):
    assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description and field.description.endswith("."), (
            f"{section.__name__}.{name} needs a description"
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide global_batch_size=8"),
        ({"min_lr": 1e-2}, "min_lr=0.01 is above lr=0.001"),
        ({"warmup_iters": 11}, "warmup_iters=11 is longer than train_iters=10"),
        (
            {"warmup_iters": 5, "lr_decay_iters": 4},
            "lr_decay_iters=4 is shorter than warmup_iters=5",
        ),
        (
            {"lr_schedule": "constant", "lr_decay_iters": 4},
            "lr_decay_iters=4 has no effect with lr_schedule=constant",
        ),
        ({"vocab_chunk_tokens": 8}, "Extra inputs"),  # alignment has no output head
        ({"train_iters": 2.5}, "valid integer"),
        ({"adam_betas": (0.9, 1.0)}, "less than 1"),
    ],
)
def test_stage_refused(change, says):
    with pytest.raises(ValidationError, match=says):
        AlignConfig.model_validate({**STAGE, **change})


def test_an_objective_of_stage_3_needs_a_weight():
    chosen = {**STAGE, "objective": {"kind": "reverse_kl"}}
    with pytest.raises(ValidationError, match="reverse_kl has no effect with teacher_weight=0"):
        FinetuneConfig.model_validate(chosen)
    assert FinetuneConfig.model_validate({**chosen, "teacher_weight": 1.0}).teacher_weight == 1
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        FinetuneConfig.model_validate({**chosen, "teacher_weight": 1.1})
    with pytest.raises(ValidationError, match="Extra inputs"):
        HeadStageConfig.model_validate({**chosen, "teacher_weight": 0.5})


def test_batch_arithmetic():
    stage = StageConfig.model_validate(STAGE)
    assert stage.tokens_per_step == 8 * 64
    assert [stage.num_micro_batches(dp) for dp in (1, 2, 4)] == [4, 2, 1]


def test_training_data_may_not_be_empty():
    with pytest.raises(ValidationError, match="at least 1"):
        RunConfig.model_validate({**RUN, "data": {"train": []}})


def leaf_keys(root: type[BaseModel], above: tuple[str, ...] = ()):
    for name, field in root.model_fields.items():
        below = section_type(field.annotation)
        if below is None:
            yield (*above, name)
        else:
            yield from leaf_keys(below, (*above, name))


def test_no_setting_is_without_effect(repo_root):
    """The test requires that each setting's name is read as an attribute somewhere outside the
    schema, itself or through a property or method that is read there: a setting nobody reads
    misleads its user."""
    read = set()
    for path in (repo_root / "megatron_hypenet").rglob("*.py"):
        if path.name not in ("schema.py", "model.py"):
            read |= {
                node.attr
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)
            }
    schema = ast.parse(
        (repo_root / "megatron_hypenet" / "config" / "schema.py").read_text(encoding="utf-8")
    )
    for function in ast.walk(schema):
        if isinstance(function, ast.FunctionDef) and function.name in read:
            read |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    assert [".".join(key) for key in leaf_keys(RunConfig) if key[-1] not in read] == []


def test_gates_are_bounds_in_their_ranges():
    def gates(**bounds):
        return RunConfig.model_validate({**RUN, "eval": {"gate": {"distill": bounds}}}).eval.gate

    assert gates(min_recall=80.0, recall_multiple=4).multiples == [4] and not gates().multiples
    assert gates(max_loss_ratio=1.2).after("distill").is_set
    assert not gates(max_loss_ratio=1.2).after("align").is_set
    for wrong in ({"min_recall": 101.0}, {"min_recall": 0.0}, {"max_loss_ratio": 0.0}):
        with pytest.raises(ValidationError):
            gates(**wrong)
    with pytest.raises(ValidationError, match="set min_recall too"):
        gates(max_loss_ratio=1.0, recall_multiple=2)
    with pytest.raises(ValidationError):
        RunConfig.model_validate({**RUN, "eval": {"gate": {"select": {}}}})


def test_the_mixer_of_a_run_is_chosen_by_name():
    assert AlignConfig.model_validate(STAGE).spec == default_mixer()
    chosen = AlignConfig.model_validate(
        {**STAGE, "mixer": toy_mixer.NAME, "mixer_settings": {"conv_size": 4}}
    )
    assert chosen.spec == toy_mixer.ToySpec(conv_size=4)
    for wrong, says in (
        ({"mixer": "attn"}, "mixer='attn' is no RNN mixer; known: .*lightning_attn"),
        ({"mixer": "mamba"}, "mixer='mamba' is no RNN mixer"),
        (
            {"mixer_settings": {"conv_size": 4}},
            "lightning_attn.conv_size: unknown key",
        ),
    ):
        with pytest.raises(ValidationError, match=says):
            AlignConfig.model_validate({**STAGE, **wrong})


def test_evaluations_are_few_and_cheap_unless_their_interval_is_set():
    long = {**STAGE, "train_iters": 2000, "seq_length": 512}
    settings = {**RUN, "align": {**long, "eval_interval": 7}, "distill": long}
    run = RunConfig.model_validate({**settings, "eval": {"seq_length": 512}})
    assert run.eval_every(run.align) == 7
    assert run.eval_every(run.distill) == 200
    # 10 steps of 512 tokens take less time than one evaluation of 48 sequences of 512
    assert run.eval_every(run.finetune) > run.finetune.train_iters
    forward_of_training = 3 * run.distill.tokens_per_step * run.eval_every(run.distill)
    assert (16 * 2 + 32) * 512 < forward_of_training / 20


def test_a_password_in_an_address_is_refused_and_not_repeated():
    settings = {**RUN, "trackers": {"mlflow": {"uri": "https://me:hunter2@mlflow.example/x"}}}
    with pytest.raises(ValidationError, match="MLFLOW_TRACKING_PASSWORD"):
        RunConfig.model_validate(settings)
    kept = RunConfig.model_validate({**RUN, "trackers": {"mlflow": {"uri": "runs/mlflow"}}})
    assert kept.trackers.mlflow.experiment == "hypenet" and kept.trackers.wandb is None


ENGINE = {"transformer_impl": "transformer_engine"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fp8": {"student": "current"}}, "set model.transformer_impl=transformer_engine too"),
        ({"fp8": {"teacher": True}, "device": "cpu"}, "fp8.teacher=true with device=cpu"),
        ({"model": ENGINE, "device": "cpu"}, "model.transformer_impl=.* with device=cpu"),
        (
            {"fp8": {"teacher": True}, "model": ENGINE, "precision": "float32"},
            "fp8.teacher=true and model.transformer_impl=.* with precision=float32",
        ),
        ({"fp8": {"student": "mxfp8"}}, "current"),
    ],
)
def test_fp8_that_cannot_be_computed_is_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        RunConfig.model_validate({**RUN, **changes})


def test_fp8_is_off_unless_it_is_asked_for():
    run = RunConfig.model_validate(RUN)
    assert not run.fp8.used and run.model.transformer_impl == "local"
    asked = {"model": ENGINE, "fp8": {"teacher": True, "student": "blockwise"}}
    assert RunConfig.model_validate({**RUN, **asked}).fp8.used
