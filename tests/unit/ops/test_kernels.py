import pytest
import torch

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.ops import (
    adamw,
    fp8_linear,
    gated_norm,
    gradient_sum,
    kernels,
    lightning_mix,
    norm_rope,
    rms_norm,
    sigmoid_gate,
    swiglu,
)
from megatron_hypenet.ops.lightning_attn import dispatch
from megatron_hypenet.parallel import vocab_loss
from megatron_hypenet.parallel.vocab_loss import torch_terms

OTHER_PACKAGES = {"gated_delta_rule", "kimi_delta_attention"}
"""Families whose kernels are flash-linear-attention's."""


class OnGpu(torch.Tensor):
    """A CPU tensor that takes the branches of a GPU's."""

    is_cuda = True


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", dict.fromkeys(kernels.FAMILIES, True))


@pytest.mark.parametrize(
    ("words", "families"),
    [
        ("", ()),
        ("norm_rope", ("norm_rope",)),
        (" norm_rope, vocab_loss,", ("norm_rope", "vocab_loss")),
    ],
)
def test_the_environment_names_families(words, families):
    assert kernels.named(words) == families
    assert kernels.named("all") == tuple(kernels.FAMILIES)


def test_a_wrong_name_is_refused_with_the_right_ones():
    with pytest.raises(
        ConfigError, match="norm is no family of kernels; choose from adamw, .*gated_norm"
    ):
        kernels.named("norm")
    with pytest.raises(KeyError):
        kernels.disable("norm")


def chosen(monkeypatch):
    """Return which families a GPU's tensors reach."""
    kernel = object()
    monkeypatch.setattr(norm_rope, "fused_norm_rope", lambda *args: kernel)
    monkeypatch.setattr(gated_norm, "fused_gated_norm", lambda *args: kernel)
    monkeypatch.setattr(rms_norm, "fused_rms_norm", lambda *args: kernel)
    monkeypatch.setattr(swiglu, "fused_swiglu", lambda *args: kernel)
    monkeypatch.setattr(sigmoid_gate, "fused_sigmoid_gate", lambda *args: kernel)
    monkeypatch.setattr(
        "megatron_hypenet.ops.fp8_linear.triton.quantize_rows", lambda *args: kernel
    )
    summed, updated = [], []
    monkeypatch.setattr(adamw, "fused_adamw", lambda *args: updated.append(args))
    monkeypatch.setattr(gradient_sum, "fused_gradient_sum", lambda *args, add: summed.append(add))
    x = torch.ones(3, 1, 2, 32).as_subclass(OnGpu)
    gradient_sum.gradient_sum(x.flatten(), x.flatten(), add=True)
    step = adamw.AdamWStep(count=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    adamw.adamw(*(torch.ones(3).as_subclass(OnGpu) for _ in range(5)), step, torch.ones(()))
    found = {
        "lightning_mix": lightning_mix.fits(x.flatten(-2).repeat(1, 1, 4), 32),
        "lightning_attn": dispatch.runs_kernels(x, x),
        "norm_rope": norm_rope.norm_rope(x, torch.ones(32), torch.zeros(3, 1, 1, 32), 1e-6)
        is kernel,
        "gated_norm": gated_norm.gated_norm(x[..., 0, :], x[..., 0, :], torch.ones(32), 1e-6)
        is kernel,
        "sigmoid_gate": sigmoid_gate.sigmoid_gate(x, x) is kernel,
        "rms_norm": rms_norm.rms_norm(x[:, :, 0].repeat(1, 1, 16), torch.ones(512), 1e-6) is kernel,
        "swiglu": swiglu.swiglu(x) is kernel,
        "vocab_loss": vocab_loss._terms(x) is not torch_terms,
        "gradient_sum": summed == [True],
        "adamw": len(updated) == 1,
        "fp8_rows": fp8_linear.quantize_rows(x.reshape(-1, 32)) is kernel,
    }
    return {family for family, runs in found.items() if runs}


def test_a_disabled_family_runs_its_torch_form_and_leaves_the_others(monkeypatch):
    pytest.importorskip("triton")
    ours = set(kernels.FAMILIES) - OTHER_PACKAGES
    assert chosen(monkeypatch) == ours
    # those that need others first
    order = sorted(ours, key=lambda family: -len(kernels._needs[family]))
    for count, family in enumerate(order, 1):
        kernels.disable(family)
        assert chosen(monkeypatch) == set(order[count:])


def test_compiled_code_follows_the_switch():
    def op(x):
        return x + 1 if kernels.enabled("norm_rope") else x - 1

    compiled = torch.compile(op, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    assert compiled(x).tolist() == [1.0, 1.0]
    kernels.disable("norm_rope")
    assert compiled(x).tolist() == [-1.0, -1.0]


def test_a_family_registers_where_it_is_defined(monkeypatch):
    monkeypatch.setattr(kernels, "FAMILIES", {})
    monkeypatch.setattr(kernels, "_needs", {})
    monkeypatch.setenv(kernels.VARIABLE, "second")

    @kernels.kernel_family(
        "first", fits=lambda use: True, check=lambda where, use: None, needs=("second",)
    )
    def front():
        return 1

    kernels.kernel_family("second", fits=lambda use: True, check=lambda where, use: None)(front)
    assert front() == 1 and not kernels.enabled("second") and not kernels.enabled("first")
    assert kernels.named("all") == ("first", "second")
    with pytest.raises(AssertionError, match="registered twice"):
        kernels.kernel_family("first", fits=lambda use: True, check=lambda where, use: None)(front)
