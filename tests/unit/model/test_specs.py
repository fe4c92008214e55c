import torch
from megatron.core.transformer.identity_op import IdentityOp

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.mixers.lightning_attn import LightningAttn
from megatron_hypenet.model.mixers.softmax_attn import SoftmaxAttn
from megatron_hypenet.model.specs import block_spec, transformer_config
from megatron_hypenet.parallel.groups import init_parallel
from tests.tiny import tiny_model_config


def specs(model, **kwargs):
    init_parallel(ParallelConfig())
    return block_spec(model, (model.num_layers,), 0, **kwargs).layer_specs


def test_every_layer_gets_its_own_mixer():
    layers = specs(tiny_model_config(("lightning_attn", "attn", "lightning_attn")))
    assert [layer.submodules.self_attention.module for layer in layers] == [
        LightningAttn,
        SoftmaxAttn,
        LightningAttn,
    ]


def test_a_trunk_ends_with_its_last_mixer():
    *first, last = specs(tiny_model_config(("attn",) * 3), trunk_only=True)
    assert last.submodules.mlp is IdentityOp and all(
        layer.submodules.mlp is not IdentityOp for layer in first
    )


def test_megatron_config_follows_the_model():
    model = tiny_model_config()
    config = transformer_config(model, ParallelConfig(), torch.float64)
    assert (config.kv_channels, config.num_query_groups, config.params_dtype) == (
        8,
        3,
        torch.float64,
    )
    assert not config.add_bias_linear and config.hetereogenous_dist_checkpoint
