"""Forward and backward of a micro-batch as one CUDA graph, where launching a thousand kernels takes
longer than they run.

A graph is captured once, at the first micro-batch, and then replayed: same kernels, same order,
same memory, one launch. What it can hold is limited: one shape, no communication between ranks, no
random numbers, and gradients that end up at fixed addresses. The engine captures one only where
these conditions hold; everything else is launched kernel by kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hypenet.engine.deepspeed.bf16_accumulation import Fp32GradAccumulator
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.stages.base import MicroBatch

logger = logging.getLogger(__name__)

LAUNCH_BOUND_TOKENS = 12_288
"""Micro-batches up to this size are replayed. Stage 1 of HypeNet-2B on an H100 is then 3.4 times as
fast at 2,048 tokens and 1% faster at 12,288, stage 2 is 22% faster at 6,144
(tools/bench/results/step_tries.md)."""

TOLERANCE = 1e-3
"""Largest relative difference of loss and gradient norms between a replay and the same kernels
launched one by one: they are equal but for the order of sums in matrix products and in attention's
gradients."""

NOISE = 4
"""If two launched passes over the same micro-batch differ from each other, this many times their
difference is allowed instead: gradients that are sums of thousands of terms of both signs consist
mainly of rounding errors."""

LEAST_FREE_BYTES = 2 * 2**30
"""Bytes that must stay free beside the graphs, because collectives allocate their buffers later."""

ROOM_TO_EVALUATE = 8 * 2**30
"""With fewer bytes free, the graphs are released before an evaluation, and captured again
afterwards."""

MicroStep = Callable[[MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""Forward and backward of one micro-batch: adds its gradients to the sums; (loss, metrics)
detached."""


def eligible(batch: MicroBatch) -> bool:
    """Return whether graphs are captured for such a micro-batch: small, and without document ids
    (the masks of separate documents need the host)."""
    tokens = batch.tokens
    return (
        batch.document_ids is None
        and batch.token_weights is None
        and tokens.is_cuda
        and tokens.shape[0] * (tokens.shape[1] - 1) <= LAUNCH_BOUND_TOKENS
    )


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    metrics: dict[str, Tensor]
    marks: list[list[bool]]
    """The gradient sums that hold values after a replay."""

    def replay(self, sums: Fp32GradAccumulator) -> tuple[Tensor, dict[str, Tensor]]:
        self.graph.replay()
        sums.set_marks(self.marks)
        return self.loss, self.metrics


class CudaGraphs:
    """Captures `run` for the first micro-batch of a step, which overwrites the gradient sums, and
    for later ones, which add to them."""

    def __init__(self, run: MicroStep, sums: Fp32GradAccumulator, *, several: bool) -> None:
        """Prepare to capture `run`; `several` says whether a step has more than one micro-batch."""
        self._run = run
        self._sums = sums
        self._several = several
        self._tokens: Tensor | None = None
        self._graphs: dict[bool, _Captured] = {}
        self.failure: str | None = None
        """Reason why there is no graph, once that is known."""

    @property
    def captured(self) -> bool:
        """Return whether micro-batches are replayed."""
        return bool(self._graphs)

    def takes(self, batch: MicroBatch) -> bool:
        """Return whether `replay` takes this micro-batch."""
        same = self._tokens is None or self._tokens.shape == batch.tokens.shape
        return eligible(batch) and same and self.failure is None

    def replay(self, batch: MicroBatch, *, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of a micro-batch, in memory that the next replay overwrites;
        gradients are in the sums.

        The first call captures, and compares a replay with the same micro-batch launched kernel by
        kernel. Where either fails, the log says so, and this and all later micro-batches are
        launched kernel by kernel."""
        if self._tokens is None:
            self._tokens = batch.tokens.clone()
            try:
                self._capture()
            # errors of compilers too: launching the kernels one by one either works or fails with a
            # better message
            except Exception as error:
                self.failure = (
                    f"{type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else 'no text'}"
                )
            if self.failure is not None:
                # here, where the error and the tensors of the graph in its frames have been freed
                self._give_up()
        if self.failure is not None:
            return self._run(batch)
        self._tokens.copy_(batch.tokens)
        return self._graphs[first].replay(self._sums)

    def _capture(self) -> None:
        assert self._tokens is not None
        batch = MicroBatch(self._tokens)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # compiles and loads every kernel; the first replay overwrites its gradients in the sums
        with torch.cuda.stream(stream):
            passes = []
            for _ in range(2):
                self._sums.forget()
                loss, _ = self._run(batch)
                passes.append(self._figures(loss))
            self._run(batch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        release_memory()  # a graph has its own memory pool: the warm-up's must not stay taken
        pool = torch.cuda.graph_pool_handle()
        for first in (True, False) if self._several else (True,):
            if first:
                self._sums.forget()
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads of this process (heartbeat, NCCL's watchdog) may use
                # CUDA meanwhile
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    loss, metrics = self._run(batch)
            except Exception:
                # torch keeps the memory of a capture that failed
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
                raise
            self._graphs[first] = _Captured(graph, loss, metrics, self._sums.marks)
        loss, _ = self._graphs[True].replay(self._sums)
        replayed = self._figures(loss)
        limit = max(TOLERANCE, NOISE * _difference(*passes))
        if (off := _difference(replayed, passes[0])) > limit:
            raise RuntimeError(
                f"a replay is off launched kernels by {off:.1e} in loss or gradients, "
                f"limit {limit:.1e}"
            )
        self._sums.forget()
        torch.cuda.empty_cache()
        if (free := torch.cuda.mem_get_info()[0]) < LEAST_FREE_BYTES:
            raise RuntimeError(
                f"it leaves {free / 2**30:.1f} GiB of the GPU's memory free, "
                f"less than {LEAST_FREE_BYTES / 2**30:.0f}"
            )

    def make_room(self) -> None:
        """Release the graphs' memory before an evaluation if little is free; the next micro-batch
        captures them again."""
        if self._graphs and torch.cuda.mem_get_info()[0] < ROOM_TO_EVALUATE:
            self._tokens = None
            self._release()

    def _figures(self, loss: Tensor) -> Tensor:
        """Return values by which two passes over the same micro-batch are compared: the loss, and
        the norm of every gradient sum; fp32 on the host."""
        return torch.stack([loss.float(), *self._sums.norms()]).cpu()

    def _give_up(self) -> None:
        logger.warning(
            "WARNING: no CUDA graph (%s): each kernel is launched by itself, which is slower",
            self.failure,
        )
        self._sums.forget()
        self._release()

    def _release(self) -> None:
        self._graphs.clear()
        release_memory()


def _difference(figures: Tensor, others: Tensor) -> float:
    """Return the largest relative difference; NaN equals only NaN."""
    off = ((figures - others).abs() / others.abs().clamp(min=1e-30)).masked_fill(
        figures.isnan() & others.isnan(), 0.0
    )
    return float(off.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
