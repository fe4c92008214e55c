"""Estimated step times follow measured ones, and what a layout changes."""

import sys

import pytest

from megatron_hypenet.config.loader import load_model_config
from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
from megatron_hypenet.planning.layout_search import teacher_and_student
from megatron_hypenet.planning.machine import H100
from megatron_hypenet.planning.step_time import StepTime, step_time


@pytest.fixture(scope="module")
def bench(repo_root):
    sys.path.insert(0, str(repo_root / "tools" / "bench"))
    import step_time as module

    sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def finetune(repo_root):
    """Return a function that estimates stage 3 of HypeNet-2B on a layout."""
    shape = load_model_config(repo_root / "configs/model/hypenet_2b.yaml")
    teacher, student = teacher_and_student(shape, shape.spec("lightning_attn"))

    def of(data_ranks=1, micro_batches=8, recompute="none", gpu=H100, **parallel):
        config = HeadStageConfig(
            train_iters=1,
            seq_length=16384,
            micro_batch_size=1,
            global_batch_size=micro_batches * data_ranks,
            lr=1e-5,
            min_lr=1e-5,
            recompute=recompute,
        )
        return step_time(
            "finetune",
            teacher,
            student,
            config,
            ParallelConfig.model_validate(parallel),
            data_ranks=data_ranks,
            machine=gpu,
        )

    return of


def test_every_measured_step_is_met_within_a_tenth(bench):
    apart = [1e3 * bench.estimate(point).total / point.milliseconds for point in bench.POINTS]
    assert len(apart) >= 20
    far = [
        (point, ratio)
        for point, ratio in zip(bench.POINTS, apart, strict=True)
        if not 0.9 < ratio < 1.1
    ]
    assert far == []


def test_the_points_are_those_of_the_files(bench, repo_root):
    for point in bench.POINTS:
        text = (repo_root / "tools/bench/results" / point.source).read_text(encoding="utf-8")
        tokens = point.batch * point.tokens * point.micro_batches
        rate = 1e3 * tokens / point.gpus / point.milliseconds
        shown = [f"{point.milliseconds:.1f}", *(f"{rate + off:.0f}" for off in (-1, 0, 1))]
        assert any(f"| {value} |" in text for value in shown), (point, shown)


def test_more_micro_batches_take_more_of_everything_but_the_end(finetune):
    one, many = finetune(micro_batches=1), finetune(micro_batches=8)
    assert many.products == pytest.approx(8 * one.products)
    assert many.optimizer == one.optimizer


def test_each_axis_pays_in_its_own_coin(finetune):
    alone = finetune()
    assert alone.tensor == alone.context == alone.bubble == alone.data == alone.gather == 0
    tensor = finetune(tensor_model_parallel_size=2, sequence_parallel=True)
    assert tensor.tensor > 0 and tensor.context == tensor.bubble == 0
    assert tensor.memory < 0.6 * alone.memory
    unsplit = finetune(tensor_model_parallel_size=2)
    assert tensor.memory < unsplit.memory, "norms and residuals are computed by every rank"
    context = finetune(context_parallel_size=2)
    assert context.context > 0 and context.attention == pytest.approx(alone.attention / 2)
    assert finetune(data_ranks=2).data > finetune(data_ranks=2, gradient_exchange="bfloat16").data
    gathered = finetune(data_ranks=2, zero_stage=3)
    assert gathered.gather > 0 and gathered.optimizer == pytest.approx(alone.optimizer / 2)


def test_a_pipeline_waits_for_its_ends_and_less_with_more_micro_batches(finetune):
    few, many = (finetune(micro_batches=n, pipeline_model_parallel_size=2) for n in (4, 16))
    assert few.bubble == pytest.approx(many.bubble)
    assert few.bubble / few.total == pytest.approx(1 / 5, abs=0.02)
    assert many.bubble / many.total == pytest.approx(1 / 17, abs=0.01)


def test_chunks_that_take_turns_wait_less_and_send_more(finetune):
    plain, two, four = (
        finetune(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
        for chunks in (1, 2, 4)
    )
    assert plain.bubble > 2 * max(two.bubble, four.bubble) and min(two.bubble, four.bubble) > 0
    assert two.total < 0.95 * plain.total and four.total < 0.95 * plain.total
    # the first stage sends each chunk's hidden states, and gradients of all but its first
    assert two.pipeline == pytest.approx(3 * plain.pipeline) and plain.pipeline > 0
    assert four.pipeline == pytest.approx(7 * plain.pipeline)
    even = finetune(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_layout=(7, 7, 7, 7),
    )
    assert even.total > two.total, "the head weighs several layers"


def test_recomputation_costs_a_forward_pass(finetune):
    none, selective, full = (finetune(recompute=how) for how in ("none", "selective", "full"))
    assert selective.products == none.products and selective.memory > none.memory
    head = 8 * 3 * 2 * 2048 * 151936 * 16384 / H100.products
    assert (full.products - head) / (none.products - head) == pytest.approx(4 / 3, rel=0.02)


def test_a_group_over_several_hosts_is_bound_by_the_network(finetune):
    within, beyond = finetune(data_ranks=8), finetune(data_ranks=16, tensor_model_parallel_size=4)
    assert beyond.data / (15 / 16 / 4) > within.data / (7 / 8), "two adapters instead of eight"


def test_shares_name_what_counts():
    assert StepTime(products=6.0, memory=3.5, data=0.5).shares() == "products 60%, memory 35%"
