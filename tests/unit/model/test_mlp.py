import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.model.mlp import SwiGLU
from tests.tiny import tiny_model_config


def built(dtype=torch.float64, recompute="none"):
    layer = build_model(
        tiny_model_config(), ParallelConfig(), dtype=dtype, seed=3, recompute=recompute
    ).decoder.layers[0]
    return layer.mlp


def result(mlp, forward, x):
    x = x.clone().requires_grad_()
    y, bias = forward(x)
    y.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in mlp.parameters())]
    mlp.zero_grad()
    return [y.detach(), *gradients], bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_every_bit_is_that_of_megatrons_mlp(dtype, recompute):
    mlp = built(dtype, recompute)
    x = torch.randn(7, 2, 24, dtype=dtype)
    got, bias = result(mlp, mlp, x)
    want, _ = result(mlp, lambda x: MLP.forward(mlp, x), x)
    assert bias is None and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_it_is_two_products_around_swiglu():
    mlp = built()
    x = torch.randn(3, 1, 24, dtype=torch.float64)
    gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x)[0], F.linear(F.silu(gate) * up, mlp.linear_fc2.weight))


def test_what_megatron_passes_is_taken():
    mlp = built()
    x = torch.randn(3, 1, 24, dtype=torch.float64)
    assert torch.equal(mlp(x, per_token_scale=None, padding_mask=None)[0], mlp(x)[0])
    assert type(SwiGLU(mlp.config, is_mtp_layer=False, name="decoder.layers.0.mlp")) is SwiGLU
    with pytest.raises(AssertionError, match="scaled per token"):
        mlp(x, per_token_scale=x[..., 0])


def test_weights_keep_megatrons_names():
    assert [name for name, _ in built().named_parameters()] == [
        "linear_fc1.weight",
        "linear_fc2.weight",
    ]
    keys = build_model(
        tiny_model_config(), ParallelConfig(), dtype=torch.float64, seed=3
    ).sharded_state_dict()
    parts = [part.global_shape for part in keys["decoder.layers.0.mlp.linear_fc1.weight"].build()]
    # gate and up are pieces of one tensor
    assert parts == [(80, 24), (80, 24)] and "decoder.layers.0.mlp.linear_fc2.weight" in keys
