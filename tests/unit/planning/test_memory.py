"""The memory of a training stage: against an H100's own count, against DeepSpeed's
tensors."""

import json
import subprocess
import sys

import pytest

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.loader import load_model_config
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
from megatron_hypenet.planning import memory
from megatron_hypenet.planning.layout_search import teacher_and_student
from megatron_hypenet.planning.memory import stage_memory
from megatron_hypenet.stages.footprint import COMPUTE_BYTES, StageRank
from megatron_hypenet.stages.spec import stage_spec
from tests.unit.engine.toy import stage_config
from tests.unit.planning.memory_worker import BUCKET

GIB = 2**30


@pytest.fixture
def model(repo_root):
    return lambda name: load_model_config(repo_root / "configs" / "model" / f"{name}.yaml")


def config(batch, length, *, ranks=1, micro_batches=1, **changes):
    return HeadStageConfig(
        train_iters=1,
        seq_length=length,
        micro_batch_size=batch,
        global_batch_size=batch * ranks * micro_batches,
        lr=1e-5,
        min_lr=1e-5,
        **changes,
    )


def estimate(shape, name, stage, *, ranks=1, fp8=None, **parallel):
    teacher, student = teacher_and_student(shape, default_mixer())
    student = stage_spec(name).student_shape(teacher, student, default_mixer())
    layout = ParallelConfig(**parallel)
    return stage_memory(name, teacher, student, stage, layout, data_ranks=ranks, fp8=fp8)


@pytest.mark.parametrize(("batch", "measured"), [(4, 15.30), (24, 26.59)])
def test_what_an_h100_counted(model, batch, measured):
    """The figure is the peak of allocated memory that tools/bench/step.py printed for stage 1 of
    HypeNet-2B on an H100 80GB, torch 2.11, 2026-11-23."""
    (found,) = estimate(model("hypenet_2b"), "align", config(batch, 512))
    assert found.total / GIB == pytest.approx(measured, rel=0.01)


TEACHER = Fp8Config(teacher=True)
BOTH = Fp8Config(teacher=True, student="current")


@pytest.mark.parametrize(
    ("stage", "batch", "length", "fp8", "measured"),
    [
        ("align", 24, 512, None, 26.51),
        ("align", 24, 512, TEACHER, 25.24),
        ("distill", 12, 512, TEACHER, 50.82),
        ("distill", 12, 512, BOTH, 51.94),
        ("finetune", 1, 16_384, BOTH, 69.69),
    ],
)
def test_what_an_h100_counted_with_fp8(model, stage, batch, length, fp8, measured):
    """Figures of tools/bench/results/fp8_h100_202611.md."""
    (found,) = estimate(model("hypenet_2b"), stage, config(batch, length), fp8=fp8)
    assert found.total / GIB == pytest.approx(measured, rel=0.01)


def test_weights_gradients_and_optimizer_are_deepspeeds_tensors(repo_root, monkeypatch):
    command = [sys.executable, "-m", "tests.unit.planning.memory_worker"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=repo_root, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr(memory, "BUCKET_ELEMENTS", BUCKET)
    for zero_stage, held in json.loads(result.stdout.splitlines()[-1]).items():
        parallel = ParallelConfig(zero_stage=int(zero_stage), gradient_exchange="bfloat16")
        weights = 1e6
        states = memory._states(StageRank(stage_config(), parallel, 1, (1,), 0), weights)
        # on one rank ZeRO-3 gathers nothing, and the bucket of ZeRO-2 and 3 may be gone already
        passing = COMPUTE_BYTES * (
            (weights if parallel.zero_stage == 3 else 0)
            + (BUCKET if parallel.zero_stage >= 2 else 0)
        )
        assert 0.99 * (sum(states.values()) - passing) <= held <= 1.01 * sum(states.values()), (
            f"ZeRO {zero_stage}: {held}"
        )


def test_sharding_and_splitting_take_their_share(model):
    shape = model("hypenet_9b")
    (alone,) = estimate(shape, "distill", config(12, 512))
    (eight,) = estimate(shape, "distill", config(12, 512, ranks=8), ranks=8)
    (zero3,) = estimate(shape, "distill", config(12, 512, ranks=8), ranks=8, zero_stage=3)
    assert (
        eight.optimizer == pytest.approx(alone.optimizer / 8)
        and eight.weights == alone.weights
        and eight.activations == alone.activations
    )
    assert zero3.weights < 0.3 * eight.weights
    (split,) = estimate(
        shape, "distill", config(12, 512), tensor_model_parallel_size=2, sequence_parallel=True
    )
    assert split.weights == pytest.approx(
        alone.weights / 2, rel=1e-3
    ) and split.teacher == pytest.approx(alone.teacher / 2, rel=1e-3)
    # over two ranks the output norm is three steps
    assert alone.activations / 2 <= split.activations < 0.6 * alone.activations
    (offloaded,) = estimate(shape, "distill", config(12, 512), offload_optimizer=True)
    assert offloaded.optimizer == 0 and alone.optimizer > 0


def test_pipeline_stages_together_hold_the_model_and_the_first_holds_most_micro_batches(model):
    shape = model("hypenet_2b")
    (whole,) = estimate(shape, "finetune", config(1, 16384))
    parts = estimate(
        shape, "finetune", config(1, 16384, micro_batches=8), pipeline_model_parallel_size=4
    )
    table = 2 * shape.vocab_size * shape.hidden_size  # the tied embedding is there twice
    assert sum(part.weights for part in parts) == pytest.approx(whole.weights + table, rel=1e-6)
    assert parts[0].activations > parts[1].activations > parts[3].activations
    assert parts[3].work > 4 * shape.vocab_size * shape.hidden_size, "the last stage has the loss"


def test_recomputation_trades_activations(model):
    shape = model("hypenet_2b")
    none, selective, full = (
        estimate(shape, "finetune", config(1, 16384, recompute=kind))[0]
        for kind in ("none", "selective", "full")
    )
    assert none.activations > 1.5 * selective.activations > 5 * full.activations
    assert none.weights == selective.weights == full.weights
