"""The layer gives what Megatron's own forward gives on the same modules; its kernels take every sum
beside a norm with them."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.model.layer import PreNormLayer
from megatron_hypenet.model.specs import layer_spec, transformer_config
from megatron_hypenet.ops.rms_norm import fused_residual_rms_norm
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel import norm as norms
from megatron_hypenet.parallel.recompute import DropOutput
from tests.tiny import tiny_model_config

TOKENS = 7
IDS = torch.arange(2 * TOKENS).view(2, TOKENS)
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 4, [0] * 5 + [1] * 2])


def one_layer(dtype=torch.float64, mixer="lightning_attn", **options):
    groups.init_parallel(ParallelConfig(), seed=3)
    model = tiny_model_config((mixer,))
    config = transformer_config(model, ParallelConfig(), dtype)
    return build_module(
        layer_spec(model, mixer, **options),
        config=config,
        layer_number=1,
        pg_collection=groups.collection(),
    ).to(dtype)


def passed(layer, forward, dtype=torch.float64, **more):
    """Return output and gradients by name; the input and its place in the graph are those of a
    layer inside a model."""
    generator = torch.Generator().manual_seed(4)
    x, dy = (
        torch.randn(TOKENS, 2, 24, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    leaf = x.requires_grad_()
    angles = torch.linspace(0, 9, TOKENS)[:, None, None, None].expand(-1, 1, 1, 8)
    layer.zero_grad()
    y, context = forward(
        layer, hidden_states=leaf * 1, rotary_pos_emb=angles, attention_mask=None, **more
    )
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": leaf.grad,
        **{name: p.grad.clone() for name, p in layer.named_parameters()},
    }, context


@pytest.mark.parametrize("mixer", ["lightning_attn", "attn"])
@pytest.mark.parametrize("with_mlp", [True, False])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_it_is_megatrons_layer_in_float64(mixer, with_mlp, documents):
    layer = one_layer(mixer=mixer, with_mlp=with_mlp)
    context = object()
    more = {
        "packed_seq_params": documents,
        "context": context,
        "inference_context": None,
        "padding_mask": None,
    }
    (got, kept), (want, _) = (
        passed(layer, forward, **more)
        for forward in (PreNormLayer.__call__, TransformerLayer.forward)
    )
    assert type(layer) is PreNormLayer and kept is context and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


# the interpreter cuts bf16 off where a GPU rounds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_with_the_kernels_it_is_close_and_no_sum_beside_a_norm_is_left(
    monkeypatch, dtype, tolerance
):
    pytest.importorskip("triton")
    from megatron_hypenet.ops.rms_norm import triton as kernels

    layer = one_layer(dtype)
    ran = []
    want, _ = passed(layer, TransformerLayer.forward, dtype)
    monkeypatch.setattr(norms, "residual_rms_norm", fused_residual_rms_norm)
    for name in ("forward", "add_forward", "backward"):
        right = getattr(kernels, name)
        monkeypatch.setattr(
            kernels,
            name,
            lambda *args, name=name, right=right: ran.append((name, args[-1])) or right(*args),
        )
    got, _ = passed(layer, PreNormLayer.__call__, dtype)
    assert [name for name, _ in ran] == ["forward", "add_forward", "backward", "backward"]
    assert all(torch.is_tensor(dresidual) for name, dresidual in ran if name == "backward")
    for name in want:
        error = (got[name].double() - want[name]).norm() / want[name].double().norm()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_a_model_is_the_same_whatever_is_made_again(monkeypatch, recompute, documents):
    """Against Megatron's layers that keep everything; with "layernorm" recomputed the outputs of
    norms are dropped."""
    results, drops = [], []
    monkeypatch.setattr(
        DropOutput,
        "checkpoint",
        lambda *args, right=DropOutput.checkpoint: drops.append(args[1]) or right(*args),
    )
    for forward, kind in ((TransformerLayer.forward, "none"), (PreNormLayer.forward, recompute)):
        monkeypatch.setattr(PreNormLayer, "forward", forward)
        model = build_model(
            tiny_model_config(), ParallelConfig(), dtype=torch.float64, seed=5, recompute=kind
        )
        hidden = model.hidden(IDS, documents)
        hidden.square().sum().backward()
        results.append(
            {
                "hidden": hidden.detach(),
                **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            }
        )
    assert sum(isinstance(dropped, norms.RMSNorm) for dropped in drops) == (
        4 if recompute == "selective" else 0
    )
    want, got = results
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kernels", [False, True])
def test_hooks_on_layers_see_the_residual_stream_and_nothing_else_changes_without_grad(
    monkeypatch, kernels
):
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(norms, "residual_rms_norm", fused_residual_rms_norm)
    model = build_model(tiny_model_config(), ParallelConfig(), dtype=torch.float32, seed=5)
    states = model.hidden_states(IDS)
    with monkeypatch.context() as patched:
        patched.setattr(PreNormLayer, "forward", TransformerLayer.forward)
        want = model.hidden_states(IDS)
    assert len(states) == len(want) == 3 and not any(state.requires_grad for state in states)
    for got, exact in zip(states, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
