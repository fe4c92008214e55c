import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.specs import transformer_config
from megatron_hypenet.parallel.groups import init_parallel, tensor_group
from megatron_hypenet.parallel.norm import AllHeadsRMSNorm, RMSNorm
from tests.tiny import tiny_model_config


def test_norms_are_weight_times_normalised_value():
    init_parallel(ParallelConfig())
    config = transformer_config(tiny_model_config(), ParallelConfig(), torch.float64)
    x = torch.randn(5, 3, 24, dtype=torch.float64) * 7
    for norm in (RMSNorm(config, 24, 1e-6), AllHeadsRMSNorm(config, 24, tensor_group())):
        torch.nn.init.normal_(norm.weight)
        want = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(norm(x), want)


def test_the_all_heads_weight_is_marked_as_split_for_optimizer_and_checkpoint():
    init_parallel(ParallelConfig())
    config = transformer_config(tiny_model_config(), ParallelConfig(), torch.float32)
    norm = AllHeadsRMSNorm(config, 24, tensor_group())
    assert norm.weight.tensor_model_parallel and norm.weight.partition_dim == 0
    (sharded,) = norm.sharded_state_dict("o_norm.").values()
    assert sharded.key == "o_norm.weight" and tuple(sharded.global_shape) == (24,)
