"""Ranks as threads of one process: the collectives of context parallelism, carried out between
threads instead of processes.

What arrives is not there before `wait`: receive buffers hold NaN until then, so that using one too
early shows."""

import queue
import threading
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

PATIENCE_S = 30


class ThreadGroup:
    """What our code asks of a process group."""

    def __init__(self, rank, size, shared):
        self._rank = rank
        self._size = size
        self.shared = shared

    def rank(self):
        return self._rank

    def size(self):
        return self._size


class _Shared:
    def __init__(self, size):
        self.slots = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.mail = {(a, b): queue.Queue() for a in range(size) for b in range(size)}


class _Work:
    def __init__(self, finish):
        self.wait = finish


def _receive(box, shared):
    """Return what the peer sent, or an error as soon as any rank failed."""
    for _ in range(10 * PATIENCE_S):
        try:
            return box.get(timeout=0.1)
        except queue.Empty:
            if shared.barrier.broken:
                raise threading.BrokenBarrierError from None
    raise TimeoutError("nothing was sent")


def _everyone(group, tensor):
    """Return the same argument of all ranks, in order of rank."""
    shared = group.shared
    shared.slots[group.rank()] = tensor.detach().clone()
    shared.barrier.wait()
    tensors = list(shared.slots)
    shared.barrier.wait()
    return tensors


def _deliver(output, value, async_op):
    if not async_op:
        output.copy_(value)
        return None
    if output.is_floating_point():
        output.fill_(float("nan"))
    return _Work(lambda: output.copy_(value))


def all_gather_into_tensor(output, mine, group=None, async_op=False):
    assert output.is_contiguous() and mine.is_contiguous()
    parts = [part.flatten() for part in _everyone(group, mine)]
    return _deliver(output.view(-1), torch.cat(parts), async_op)


def reduce_scatter_tensor(output, mine, group=None, async_op=False):
    assert output.is_contiguous() and mine.is_contiguous()
    total = sum(_everyone(group, mine)).flatten()
    return _deliver(output.view(-1), total.chunk(group.size())[group.rank()], async_op)


def all_to_all_single(output, mine, output_splits, input_splits, group=None):
    assert output.is_contiguous() and mine.is_contiguous()
    pieces = _everyone(group, mine)
    splits = group.shared
    splits.slots[group.rank()] = list(input_splits)
    splits.barrier.wait()
    all_splits = list(splits.slots)
    splits.barrier.wait()
    me = group.rank()
    arrived = [piece.split(split)[me] for piece, split in zip(pieces, all_splits, strict=True)]
    assert [len(piece) for piece in arrived] == list(output_splits)
    output.copy_(torch.cat(arrived))


class P2POp:
    def __init__(self, op, tensor, peer, group=None):
        assert tensor.is_contiguous()
        self.op = op
        self.tensor = tensor
        self.peer = peer
        self.group = group


def batch_isend_irecv(operations):
    works = []
    for each in operations:
        mine = each.group.rank()
        mail = each.group.shared.mail
        if each.op is dist.isend:
            mail[mine, each.peer].put(each.tensor.detach().clone())
        else:
            each.tensor.fill_(float("nan"))
            works.append(
                _Work(
                    lambda op=each, box=mail[each.peer, mine]: op.tensor.copy_(
                        _receive(box, op.group.shared)
                    )
                )
            )
    return works


@contextmanager
def threaded_collectives():
    """Let torch.distributed's collectives work on `ThreadGroup`s inside the block."""
    replaced = {
        "all_gather_into_tensor": all_gather_into_tensor,
        "all_to_all_single": all_to_all_single,
        "reduce_scatter_tensor": reduce_scatter_tensor,
        "P2POp": P2POp,
        "batch_isend_irecv": batch_isend_irecv,
        "get_global_rank": lambda group, rank: rank,
        "get_backend": lambda group: "threads",
    }
    with mock.patch.multiple(dist, **replaced):
        yield


def on_ranks(size, function):
    """Return the results of function(group) on all ranks, in order; the first error of any rank is
    raised."""
    shared = _Shared(size)
    results = [None] * size
    errors = []

    def run(rank):
        try:
            # each rank differentiates in its own thread: on a GPU one thread of autograd would
            # serve all ranks, and wait for itself
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(ThreadGroup(rank, size, shared))
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)
            shared.barrier.abort()

    with threaded_collectives():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next(
            (error for error in errors if not isinstance(error, threading.BrokenBarrierError)),
            errors[0],
        )
    return results
