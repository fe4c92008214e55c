"""Run by torchrun: context-parallel ops in groups of 1, 2, 4, ... up to all processes, against
dense float64 definitions.

On GPUs if every process has one, else on the CPU. Rank 0 prints one JSON line per check: its name
and the largest errors over all ranks."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_hypenet.model.mixers.lightning_attn import context_lightning_attn  # noqa: E402
from megatron_hypenet.ops.decay import log_decay  # noqa: E402
from megatron_hypenet.parallel import context  # noqa: E402
from tests.dense_attention import dense_lightning, dense_softmax, document_ids  # noqa: E402

B = 2
T = 48
H = 6
G = 2
DK = 8
DV = 8
SCALE = 0.4
LIMIT = 1e-12
"""Largest absolute error allowed in float64; values are of order one."""
DEVICE = (
    torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if torch.cuda.is_available()
    else torch.device("cpu")
)
REPORTS = []


ids = partial(document_ids, length=T)
DOCUMENTS = {
    "none": None,
    "random": ids((7, 30, 31, 40), (1, 19, 47)),
    "chunk_edges": ids((6, 12, 24, 36), (3, 9, 24, 45)),
    "one_boundary": ids((29,), (24,)),
    "every_few_tokens": ids(range(3, T, 3), range(1, T)),
    "one_row_whole": ids((), (5, 33)),
}


def lightning(group, ids, q, k, v):
    return context_lightning_attn(
        q, k, v, log_decay(q.shape[2]), scale=SCALE, group=group, document_ids=ids
    )


def softmax(method, group, ids, q, k, v):
    return context.context_softmax_attn(
        q, k, v, scale=SCALE, group=group, document_ids=ids, method=method
    )


OPS = {
    "lightning": (
        lightning,
        lambda q, k, v, ids: dense_lightning(q, k, v, log_decay(H), SCALE, ids),
        H,
    ),
    "all_gather": (
        partial(softmax, "all_gather"),
        lambda q, k, v, ids: dense_softmax(q, k, v, SCALE, ids),
        G,
    ),
    "ring": (partial(softmax, "ring"), lambda q, k, v, ids: dense_softmax(q, k, v, SCALE, ids), G),
}


def draw(groups, length=T, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(length + groups)
    shapes = ((H, DK), (groups, DK), (groups, DV), (H, DV))
    drawn = [
        torch.randn(B, length, heads, d, generator=generator, dtype=torch.float64, device="cpu")
        for heads, d in shapes
    ]
    return [x.to(DEVICE, dtype) for x in drawn]


def report(name, errors, limit=LIMIT):
    """Note the errors of this rank under the name of a check."""
    REPORTS.append((name, limit, errors))


def flush_reports():
    """Print, on all ranks, the largest errors over the world of each check noted since, and stop if
    one is above its limit."""
    worst = torch.tensor(
        [error for _, _, errors in REPORTS for error in errors.values()], dtype=torch.float64
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    values = iter(worst.tolist())
    lines = [
        {"check": name, "limit": limit, **{key: next(values) for key in errors}}
        for name, limit, errors in REPORTS
    ]
    if dist.get_rank() == 0:
        print("\n".join(map(json.dumps, lines)), flush=True)
    for line in lines:
        assert (
            max(value for key, value in line.items() if key not in ("check", "limit"))
            <= line["limit"]
        ), line
    REPORTS.clear()


def compare(got, want, relative_to=None):
    """Return the largest absolute error, or that error over the largest value of `relative_to`."""
    error = (got.detach().double() - want.detach().double()).abs().max()
    return (error if relative_to is None else error / relative_to.detach().abs().max()).item()


def parity(op, dense, groups, group, ids, wrap=lambda f: f, dtype=torch.float64, relative=False):
    """Return the largest errors of o, dq, dk, dv of this rank's tokens; `want` is float64, whatever
    dtype the op runs in."""
    *inputs, weight = draw(groups, dtype=dtype)
    whole = [x.double().clone().requires_grad_() for x in inputs]
    want = dense(*whole, ids)
    (want * weight.double()).sum().backward()
    split = partial(context.split_sequence, group=group, dim=1)
    local = [split(x).clone().requires_grad_() for x in inputs]
    o = wrap(partial(op, group, ids))(*local)
    assert o.dtype == dtype
    # an upstream gradient that is not contiguous: collectives and views must not assume that it is
    upstream = split(weight).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    o.backward(upstream)
    errors = {"o": compare(o, split(want), want if relative else None)}
    for name, mine, full in zip(("dq", "dk", "dv"), local, whole, strict=True):
        assert mine.grad.dtype == dtype
        errors[name] = compare(mine.grad, split(full.grad), full.grad if relative else None)
    return errors


def check_parity(group, size):
    for op_name, (op, dense, groups) in OPS.items():
        for name, ids in DOCUMENTS.items():
            report(f"{op_name} cp={size} documents={name}", parity(op, dense, groups, group, ids))


def check_recompute_and_inference(group, size):
    for op_name, (op, dense, groups) in OPS.items():
        for reentrant in (False, True):
            wrap = lambda f, reentrant=reentrant: partial(checkpoint, f, use_reentrant=reentrant)  # noqa: E731
            errors = parity(op, dense, groups, group, DOCUMENTS["random"], wrap)
            report(f"{op_name} cp={size} recomputed reentrant={reentrant}", errors)
        *inputs, _ = draw(groups)
        with torch.no_grad():
            o = op(group, None, *(context.split_sequence(x, group, 1) for x in inputs))
            whole = context.gather_sequence(o, group, 1)
        report(f"{op_name} cp={size} no_grad", {"o": compare(whole, dense(*inputs, None))})


def check_narrow(group, size):
    """Check tensors in a compute dtype with fp32 sums behind them: errors relative to the largest
    value, a few roundings of the dtype."""
    for op_name, (op, dense, groups) in OPS.items():
        for dtype, limit in ((torch.bfloat16, 2**-7), (torch.float32, 1e-6)):
            errors = parity(
                op, dense, groups, group, DOCUMENTS["random"], dtype=dtype, relative=True
            )
            report(f"{op_name} cp={size} {dtype}", errors, limit)


def check_layout(group, size):
    for x in (
        torch.arange(2 * T).view(2, T),
        torch.arange(2 * T).view(2, T) % 3 == 0,
        torch.randn(2, T, 3).bfloat16(),
    ):
        mine = context.split_sequence(x, group, 1)
        assert mine.shape[1] == T // size and torch.equal(
            context.gather_sequence(mine, group, 1), x
        ), x.dtype
    positions = context.local_positions(T // size, group, DEVICE)
    assert torch.equal(positions, context.split_sequence(torch.arange(T), group, 0))
    x = draw(G)[0][0, :, 0]
    mine = context.split_sequence(x, group, -2).clone().requires_grad_()
    whole = context.gather_sequence(mine, group, -2)
    weight = torch.linspace(-1, 1, T, dtype=torch.float64)[:, None]
    (whole.square() * weight * (group.rank() + 1)).sum().backward()  # every rank has another loss
    want = 2 * context.split_sequence(x * weight, group, 0) * (size + 1) * size / 2
    report(f"gather_sequence cp={size} gradient", {"dx": compare(mine.grad, want)})


def exchanged_bytes(cp_size, itemsize):
    """Return the bytes that a rank receives in one exchange, forward or backward: two states per
    rank, no matter how long they are."""
    return (cp_size - 1) * 2 * B * H * DK * DV * itemsize


def check_bytes(group, size):
    """Check that the collectives of Lightning Attention move what `exchanged_bytes` says, for any
    length."""
    plain = dist.all_gather_into_tensor
    moved = []

    def counted(output, mine, **kwargs):
        moved.append((size - 1) * mine.numel() * mine.element_size())
        return plain(output, mine, **kwargs)

    dist.all_gather_into_tensor = counted
    try:
        for dtype, itemsize in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)):
            for length in (T, 4 * T):
                *inputs, _ = (
                    context.split_sequence(x, group, 1).requires_grad_()
                    for x in draw(H, length, dtype)
                )
                lightning(group, None, *inputs).sum().backward()
                expected = [exchanged_bytes(size, itemsize)] * 2 if size > 1 else []
                assert moved == expected, (moved, expected, dtype, length)
                moved.clear()
    finally:
        dist.all_gather_into_tensor = plain


def main():
    torch.set_default_device(DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    torch.manual_seed(0)
    rank = dist.get_rank()
    world = dist.get_world_size()
    size = 1
    DOCUMENTS.update(
        {name: None if ids is None else ids.to(DEVICE) for name, ids in DOCUMENTS.items()}
    )
    while size <= world:
        for first in range(0, world, size):
            created = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                group = created
        for check in (
            check_layout,
            check_parity,
            check_recompute_and_inference,
            check_narrow,
            check_bytes,
        ):
            check(group, size)
        flush_reports()
        size *= 2
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
