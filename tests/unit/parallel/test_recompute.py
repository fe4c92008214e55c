import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.parallel.recompute import DropOutput, use_in_megatron

WEIGHT = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Scaled(torch.nn.Module):
    """Something cheap with a parameter, and how often it ran."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
        self.calls = 0

    def forward(self, x, y=None):
        self.calls += 1
        return torch.tanh(x * self.scale) if y is None else torch.tanh(x * self.scale * y)


def step(drops, view=False):
    """Run a cheap part and a product that reads it, or a view of it, with or without dropping."""
    cheap = Scaled()
    x = torch.arange(12.0, dtype=torch.float64).view(3, 4).div(10).requires_grad_()
    weight = WEIGHT.clone().requires_grad_()
    drop = DropOutput()
    middle = drop.checkpoint(cheap, x) if drops else cheap(x)
    out = F.linear(middle.view(1, 3, 4) if view else middle, weight)
    if drops:
        drop.discard_output_and_register_recompute(out)
    held = middle.untyped_storage().nbytes()
    return cheap, (out * x.sum()).square().sum(), (x, weight, cheap.scale), held


@pytest.mark.parametrize("view", [False, True])
def test_the_result_is_dropped_and_gradients_are_the_same(view, monkeypatch):
    """Numbers are copied only where the consumer kept another tensor than the one it was given."""
    copies = []
    copy = torch.UntypedStorage.copy_
    monkeypatch.setattr(
        torch.UntypedStorage, "copy_", lambda *storages: copies.append(1) or copy(*storages)
    )
    kept_cheap, kept_loss, kept, held = step(drops=False, view=view)
    cheap, loss, dropped, nothing = step(drops=True, view=view)
    assert held == 3 * 4 * 8 and nothing == 0
    assert torch.equal(loss, kept_loss) and cheap.calls == 1
    kept_loss.backward()
    loss.backward()
    assert cheap.calls == 2 and kept_cheap.calls == 1 and len(copies) == view
    for got, want in zip(dropped, kept, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-14, atol=0)


def test_several_in_flight_and_backward_twice():
    """Forward passes of several micro-batches come before the first backward, as in a pipeline."""
    steps = [step(drops=True) for _ in range(3)]
    for _, loss, leaves, _ in steps:
        loss.backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in leaves]
        loss.backward()
        for leaf, once in zip(leaves, first, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * once, rtol=1e-14, atol=0)


def test_inputs_that_need_no_gradient_get_none():
    cheap, drop = Scaled(), DropOutput()
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = torch.full((4,), 0.1, dtype=torch.float64)
    out = drop.checkpoint(cheap, x, y) @ WEIGHT.T.clone().requires_grad_()
    drop.discard_output_and_register_recompute(out)
    out.sum().backward()
    assert x.grad is not None and y.grad is None


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_dropped_where_no_input_needs_a_gradient(frozen):
    cheap, drop = Scaled(), DropOutput()
    with torch.set_grad_enabled(frozen):
        middle = drop.checkpoint(cheap, torch.ones(2, 4, dtype=torch.float64))
        out = F.linear(middle, WEIGHT)
        drop.discard_output_and_register_recompute(out)
    assert middle.untyped_storage().nbytes() == 2 * 4 * 8
    if frozen:
        out.sum().backward()
        assert cheap.scale.grad is not None and cheap.calls == 1


def test_memory_of_a_forward_without_backward_is_freed_at_once():
    """No reference cycle holds the input until the garbage collector looks."""
    cheap, drop = Scaled(), DropOutput()
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True) * 1.0
    before = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    out = F.linear(drop.checkpoint(cheap, x), WEIGHT)
    drop.discard_output_and_register_recompute(out)
    assert torch._C._storage_Use_Count(x.untyped_storage()._cdata) > before - 1
    del out, drop
    assert torch._C._storage_Use_Count(x.untyped_storage()._cdata) == before


def test_gradients_of_chosen_inputs_alone_are_refused():
    _, loss, leaves, _ = step(drops=True)
    with pytest.raises(RuntimeError, match="torch.autograd.grad"):
        torch.autograd.grad(loss, leaves[:1])


def test_megatrons_layers_use_it():
    from megatron.core import tensor_parallel

    use_in_megatron()
    assert tensor_parallel.CheckpointWithoutOutput is DropOutput
