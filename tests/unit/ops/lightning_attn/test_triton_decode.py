"""The kernel of the step against the definition: on a GPU where there is one, in Triton's
interpreter elsewhere."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn.decode import StateSlots
from megatron_hypenet.ops.lightning_attn.triton_decode import triton_lightning_decode

from .test_decode import SCALE, expected, inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# as in test_triton.py: the interpreter cannot multiply bf16
LIMITS = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def relative(found, right):
    found, right = found.double().cpu(), right.double()
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("dims", [(16, 16), (8, 40), (128, 128), (100, 256)])
def test_equals_the_definition(dims, dtype):
    q, k, v, states = inputs(dim_k=dims[0], dim_v=dims[1])
    q, k, v = (x.to(dtype) for x in (q, k, v))
    slots = torch.tensor([4, 0, 2])
    new = torch.tensor([False, True, False])
    o, after = expected(q, k, v, states, slots, new)
    given = [x.to(DEVICE) for x in (q, k, v)]
    cache = states.to(DEVICE)
    found = triton_lightning_decode(
        *given,
        log_decay(2),
        StateSlots(cache, slots.to(DEVICE), new.to(DEVICE)),
        scale=SCALE,
    )
    assert found.dtype == dtype
    assert relative(found, o) < LIMITS[dtype]
    assert relative(cache, after) < LIMITS[torch.float32]
    assert torch.equal(cache.cpu()[[1, 3]], states[[1, 3]])


def test_reads_strided_rows_and_a_cache_with_gaps_between_its_states():
    q, k, v, states = inputs(heads=3, dim_k=16, dim_v=16)
    joined = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).to(DEVICE)
    pages = torch.zeros(5, 3 * 16 * 16 + 7, device=DEVICE)
    cache = pages[:, :-7].view(5, 3, 16, 16)
    cache.copy_(states)
    slots, new = torch.tensor([1, 3, 0]), torch.tensor([False, False, True])
    o, after = expected(q, k, v, states, slots, new)
    parts = [x.unflatten(1, (3, 16)) for x in joined.chunk(3, dim=1)]
    found = triton_lightning_decode(
        *parts,
        log_decay(3),
        StateSlots(cache, slots.to(DEVICE), new.to(DEVICE)),
        scale=SCALE,
    )
    assert relative(found, o) < 1e-6 and relative(cache, after) < 1e-6
    assert not pages[:, -7:].any()


def test_what_a_new_request_finds_in_its_slot_does_not_matter():
    q, k, v, states = (x.to(DEVICE) for x in inputs())
    states[:] = torch.nan
    slots, new = torch.arange(3, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    found = triton_lightning_decode(
        q, k, v, log_decay(2), StateSlots(states, slots, new), scale=SCALE
    )
    assert found.isfinite().all() and states[:3].isfinite().all()
