import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.specs import transformer_config
from megatron_hypenet.ops.rope import apply_rope
from megatron_hypenet.parallel.groups import init_parallel, tensor_group
from megatron_hypenet.parallel.norm import AllHeadsRMSNorm, RMSNorm
from tests.tiny import tiny_model_config


def test_norms_are_weight_times_normalised_value():
    init_parallel(ParallelConfig())
    config = transformer_config(tiny_model_config(), ParallelConfig(), torch.float64)
    x, gate = torch.randn(5, 3, 24, dtype=torch.float64) * 7, torch.randn(5, 3, 24, dtype=torch.float64)
    for norm, options, factor in (
        (RMSNorm(config, 24, 1e-6), (), 1.0),
        (AllHeadsRMSNorm(config, 24, tensor_group()), (gate,), torch.sigmoid(gate)),
    ):
        torch.nn.init.normal_(norm.weight)
        want = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * factor
        torch.testing.assert_close(norm(x, *options), want)


def test_a_per_head_norm_rotates_when_it_gets_angles():
    init_parallel(ParallelConfig())
    norm = RMSNorm(transformer_config(tiny_model_config(), ParallelConfig(), torch.float64), 8, 1e-6, per_head=True)
    x, angles = torch.randn(5, 2, 3, 8, dtype=torch.float64), torch.randn(5, 1, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    torch.testing.assert_close(norm(x, angles), apply_rope(norm(x), angles))


def test_the_all_heads_weight_is_marked_as_split_for_optimizer_and_checkpoint():
    init_parallel(ParallelConfig())
    config = transformer_config(tiny_model_config(), ParallelConfig(), torch.float32)
    norm = AllHeadsRMSNorm(config, 24, tensor_group())
    assert norm.weight.tensor_model_parallel and norm.weight.partition_dim == 0
    (sharded,) = norm.sharded_state_dict("o_norm.").values()
    assert sharded.key == "o_norm.weight" and tuple(sharded.global_shape) == (24,)
