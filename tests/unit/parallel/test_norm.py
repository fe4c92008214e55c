import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.specs import transformer_config
from megatron_hypenet.ops.rms_norm import fused_rms_norm
from megatron_hypenet.ops.rope import apply_rope
from megatron_hypenet.parallel import norm as norms
from megatron_hypenet.parallel.groups import init_parallel, tensor_group
from megatron_hypenet.parallel.norm import AllHeadsRMSNorm, RMSNorm
from megatron_hypenet.parallel.recompute import DropOutput
from tests.tiny import tiny_model_config


def test_norms_are_weight_times_normalised_value():
    init_parallel(ParallelConfig())
    config = transformer_config(tiny_model_config(), ParallelConfig(), torch.float64)
    x = torch.randn(5, 3, 24, dtype=torch.float64) * 7
    gate = torch.randn(5, 3, 24, dtype=torch.float64)
    for norm, options, factor in (
        (RMSNorm(config, 24, 1e-6), (), 1.0),
        (AllHeadsRMSNorm(config, 24, tensor_group()), (gate,), torch.sigmoid(gate)),
    ):
        torch.nn.init.normal_(norm.weight)
        want = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * factor
        torch.testing.assert_close(norm(x, *options), want)


@pytest.mark.parametrize("partial", [False, True])
def test_a_prenorm_gives_the_sum_and_its_norm(partial):
    """The same holds where the weight's gradient is summed over ranks, here over one."""
    init_parallel(ParallelConfig())
    norm = RMSNorm(
        transformer_config(tiny_model_config(), ParallelConfig(), torch.float64), 24, 1e-6
    )
    norm.partial_gradient = partial
    x, residual, dy = torch.randn(3, 5, 2, 24, dtype=torch.float64)
    for added, summed in ((None, x), (residual, x + residual)):
        normal, total = norm(x, residual=added, prenorm=True)
        assert torch.equal(total, summed) and torch.equal(normal, norm(summed))
        want, got = (torch.autograd.grad(y, norm.weight, dy) for y in (norm(summed), normal))
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_a_per_head_norm_rotates_when_it_gets_angles():
    init_parallel(ParallelConfig())
    norm = RMSNorm(
        transformer_config(tiny_model_config(), ParallelConfig(), torch.float64),
        8,
        1e-6,
        per_head=True,
    )
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    angles = torch.randn(5, 1, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    torch.testing.assert_close(norm(x, angles), apply_rope(norm(x), angles))


def test_the_kernels_output_may_be_dropped_and_made_again(monkeypatch):
    """As Megatron does it in a layer; the numbers are those of the norm that keeps its output."""
    pytest.importorskip("triton")
    monkeypatch.setattr(norms, "rms_norm", fused_rms_norm)
    init_parallel(ParallelConfig())
    norm = RMSNorm(
        transformer_config(tiny_model_config(), ParallelConfig(), torch.float32), 24, 1e-6
    )
    linear = torch.nn.Linear(24, 5)
    x = torch.randn(6, 2, 24, requires_grad=True)
    results = []
    for drop in (False, True):
        dropping = DropOutput()
        normal = dropping.checkpoint(norm, x) if drop else norm(x)
        y = linear(normal)
        if drop:
            dropping.discard_output_and_register_recompute(y)
            assert normal.untyped_storage().nbytes() == 0
        y.square().sum().backward()
        results.append([p.grad for p in (x, *norm.parameters(), *linear.parameters())])
        for p in (x, *norm.parameters(), *linear.parameters()):
            p.grad = None
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


def test_the_all_heads_weight_is_marked_as_split_for_optimizer_and_checkpoint():
    init_parallel(ParallelConfig())
    config = transformer_config(tiny_model_config(), ParallelConfig(), torch.float32)
    norm = AllHeadsRMSNorm(config, 24, tensor_group())
    assert norm.weight.tensor_model_parallel and norm.weight.partition_dim == 0
    (sharded,) = norm.sharded_state_dict("o_norm.").values()
    assert sharded.key == "o_norm.weight" and tuple(sharded.global_shape) == (24,)
