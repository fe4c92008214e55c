"""What a model holds on one rank, against what a built model holds and keeps."""

import pytest
import torch

from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig, StageConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.stages.footprint import COMPUTE_BYTES, StageRank
from tests.activation_memory import bytes_held
from tests.tiny import tiny_model_config, tiny_teacher_config


def config(kind=StageConfig, **changes):
    base = {"train_iters": 1, "seq_length": 64, "micro_batch_size": 2, "global_batch_size": 8}
    return kind(**base, lr=1e-5, min_lr=1e-5, **changes)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recurrent_layers_keep_what_they_say(recompute):
    """With recomputation a CPU keeps what a GPU keeps."""
    shapes = [tiny_model_config(("lightning_attn",) * layers) for layers in (1, 2)]
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))
    built = [
        build_model(shape, ParallelConfig(), dtype=torch.bfloat16, seed=3, recompute=recompute)
        for shape in shapes
    ]
    held = [bytes_held(model, ids)[1] for model in built]
    rank = StageRank(config(), ParallelConfig(), 1, (2,), 0)
    want = COMPUTE_BYTES * rank.saved_activations(shapes[1], 0, recompute)
    assert (held[1] - held[0]) / ids.numel() == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("trunk", [False, True])
def test_weights_of_one_rank_are_those_of_a_built_model(trunk):
    shape = tiny_teacher_config(2)
    built = build_model(shape, ParallelConfig(), dtype=torch.float32, trunk_only=trunk)
    rank = StageRank(config(), ParallelConfig(), 1, (2,), 0)
    assert rank.parameters(shape, trunk=trunk) == sum(p.numel() for p in built.parameters())


def test_the_first_of_several_stages_holds_most_micro_batches():
    ranks = [StageRank(config(), ParallelConfig(), 2, (1, 1, 1), index) for index in range(3)]
    assert [rank.micro_batches for rank in ranks] == [2, 2, 2]
    assert [rank.in_flight for rank in ranks] == [2, 2, 1]
    assert [(rank.first, rank.last) for rank in ranks] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert [list(rank.layers) for rank in ranks] == [[0], [1], [2]]


def test_chunks_hold_more_passes_of_a_part_of_the_layers():
    def ranks(micro_batches, chunks):
        settings = config().model_copy(update={"global_batch_size": 2 * micro_batches})
        parallel = ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks
        )
        layout = (1,) * (2 * chunks)
        return [StageRank(settings, parallel, 1, layout, index) for index in range(2)]

    assert [rank.in_flight for rank in ranks(8, 1)] == [2, 1]
    assert [rank.in_flight for rank in ranks(8, 2)] == [5 / 2, 3 / 2]
    assert [rank.in_flight for rank in ranks(8, 4)] == [9 / 4, 7 / 4]
    assert [rank.in_flight for rank in ranks(2, 4)] == [2, 7 / 4], "there are no more"
    first, last = ranks(8, 2)
    assert (first.layers, last.layers) == ([0, 2], [1, 3])
    assert (first.first, first.last, last.first, last.last) == (True, False, False, True)


def test_recomputation_is_a_setting_of_head_stages():
    head = StageRank(config(HeadStageConfig, recompute="full"), ParallelConfig(), 1, (1,), 0)
    assert head.recompute == "full"
    assert StageRank(config(), ParallelConfig(), 1, (1,), 0).recompute == "none"


def test_sequence_and_context_parallelism_take_their_share():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
    )
    rank = StageRank(config(), parallel, 1, (1,), 0)
    shape = tiny_model_config(("attn",))
    assert rank.stream(shape) == shape.hidden_size / 2 and rank.tokens == 64
