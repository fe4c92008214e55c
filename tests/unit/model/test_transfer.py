import torch

from megatron_hypenet.model.transfer import named_normal, repeat_groups


def test_each_query_head_gets_its_groups_rows_and_copies_are_adjacent():
    weight = torch.arange(4.0)[:, None].expand(4, 3)  # 2 groups of 2 rows
    assert (
        repeat_groups(weight, head_dim=2, heads_per_group=3)[:, 0].tolist()
        == [0, 1] * 3 + [2, 3] * 3
    )


def test_fresh_weights_depend_on_name_shape_and_seed_alone():
    torch.manual_seed(0)
    first = named_normal("a.gate", (50, 40), std=0.02, seed=1)
    torch.manual_seed(99)
    assert torch.equal(named_normal("a.gate", (50, 40), std=0.02, seed=1), first)
    assert not torch.equal(named_normal("b.gate", (50, 40), std=0.02, seed=1), first)
    assert not torch.equal(named_normal("a.gate", (50, 40), std=0.02, seed=2), first)
    assert abs(first.std().item() - 0.02) < 1e-3
    assert named_normal("a", (2,), std=1.0, seed=0, dtype=torch.float64).dtype == torch.float64
