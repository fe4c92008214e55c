import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_hypenet.parallel.fused_sections import split_factory


def test_each_section_keeps_its_place_in_the_global_tensor():
    """Rank 1 of 2 holds rows [q_1; v_1]; each must land in the second half of its own section."""
    local = torch.arange(10.0).view(5, 2)  # 3 rows of q, 2 rows of v
    fused = ShardedTensor.from_rank_offsets("in.weight", local, (0, 1, 2))
    factory = split_factory(fused, {"q": 3, "v": 2})
    parts = factory.build()
    assert {
        name: (part.key, tuple(part.global_shape), tuple(part.global_offset))
        for name, part in parts.items()
    } == {
        "q": ("in.weight.q", (6, 2), (3, 0)),
        "v": ("in.weight.v", (4, 2), (2, 0)),
    }
    assert torch.equal(factory.merge_fn({name: part.data for name, part in parts.items()}), local)
