import pytest
import torch

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import lightning_decode, naive_lightning_attn
from megatron_hypenet.ops.lightning_attn.decode import StateSlots, torch_lightning_decode

SCALE = 0.3


def inputs(n=3, heads=2, dim_k=8, dim_v=12, slots=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    q, k, v = draw(n, heads, dim_k), draw(n, heads, dim_k), draw(n, heads, dim_v)
    return q, k, v, draw(slots, heads, dim_k, dim_v)


def expected(q, k, v, states, slots, new):
    """Return (o, states) by the definition, in float64."""
    states = states.double().clone()
    outs = []
    for row, slot in enumerate(slots.tolist()):
        before = torch.zeros_like(states[slot]) if new[row] else states[slot]
        token = [x[row].double()[None, None] for x in (q, k, v)]
        o, after = naive_lightning_attn(
            *token, log_decay(q.shape[1]), scale=SCALE, initial_state=before[None]
        )
        outs.append(o[0, 0])
        states[slot] = after[0]
    return torch.stack(outs), states


@pytest.mark.parametrize("step", [lightning_decode, torch_lightning_decode])
def test_continues_the_states_in_the_slots_and_no_others(step):
    q, k, v, states = inputs()
    slots = torch.tensor([4, 0, 2])
    new = torch.tensor([False, True, False])
    o, after = expected(q, k, v, states, slots, new)
    found = step(q, k, v, log_decay(2), StateSlots(states, slots, new), scale=SCALE)
    torch.testing.assert_close(found.double(), o, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(states.double(), after, rtol=1e-6, atol=1e-6)
    assert torch.equal(states[[1, 3]], inputs()[3][[1, 3]])


def test_float64_is_exact():
    q, k, v, states = inputs(dtype=torch.float64)
    slots, new = torch.tensor([1, 3, 0]), torch.tensor([False, False, True])
    o, after = expected(q, k, v, states, slots, new)
    found = lightning_decode(q, k, v, log_decay(2), StateSlots(states, slots, new), scale=SCALE)
    torch.testing.assert_close(found, o, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(states, after, rtol=1e-13, atol=1e-13)


def test_what_a_new_request_finds_in_its_slot_does_not_matter():
    q, k, v, states = inputs()
    states[:] = torch.nan
    slots, new = torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool)
    found = lightning_decode(q, k, v, log_decay(2), StateSlots(states, slots, new), scale=SCALE)
    assert found.isfinite().all() and states[:3].isfinite().all() and states[3:].isnan().all()


def test_outputs_have_the_dtype_of_the_queries():
    q, k, v, _ = inputs(dtype=torch.bfloat16)
    states = torch.zeros(5, 2, 8, 12)
    new = torch.zeros(3, dtype=torch.bool)
    found = lightning_decode(
        q, k, v, log_decay(2), StateSlots(states, torch.arange(3), new), scale=1.0
    )
    assert found.dtype == torch.bfloat16 and states.dtype == torch.float32
