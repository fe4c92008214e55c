"""Several processes that tokenize batches; results come back in the order of the batches."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_hypenet.data.encode import Encoded, Encoder
from megatron_hypenet.data.readers import Batch
from megatron_hypenet.data.sources import SourceFile
from megatron_hypenet.errors import SetupError

_AHEAD = 3
"""Batches for each worker that are read before the first of them is done."""
_PR_SET_PDEATHSIG = 1
"""Number of the request in linux/prctl.h."""

_encoder: Encoder | None = None
"""The encoder of this worker process, inherited from the one that started it."""


def encoded_in_order(
    encoder: Encoder, files: Sequence[SourceFile], batches: Iterable[Batch], workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode `batches` with this number of processes. 0 encodes in this one, with as many threads
    as the tokenizer starts.

    Workers are forked, which costs no start and shares the vocabulary: only for a process that has
    neither a GPU nor process groups. Raises DataError of the first batch that has one, SetupError
    when a worker is killed.
    """
    if workers == 0:
        for batch in batches:
            yield batch, encoder.encode(batch, str(files[batch.file].path))
        return
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(encoder, os.getpid()),
    )
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch, str(files[batch.file].path))))
            if len(waiting) > _AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise SetupError(
            f"one of {workers} workers was killed, as happens when the memory is full; the same "
            "command goes on where this one stopped: give it fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(encoder: Encoder, parent: int) -> None:
    """Prepare a worker: one thread, Ctrl-C is left to the parent, and no worker outlives it."""
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _encode(batch: Batch, file: str) -> Encoded:
    assert _encoder is not None, "the pool calls _begin first"
    return _encoder.encode(batch, file)
