"""Decisions that all processes share: values from the first process, and failures that are raised
on every one.

A process that failed must not leave the others waiting in a collective: every part of a save ends
in `agree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_hypenet.errors import CheckpointError, SetupError

T = TypeVar("T")


def distributed() -> bool:
    """Return whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the global rank; 0 for a single process."""
    return dist.get_rank() if distributed() else 0


def is_first() -> bool:
    """Return whether this is the process that makes folders, writes the small files and commits."""
    return rank() == 0


def from_first(value: Any) -> Any:
    """Return the first process's `value`, on every process; collective."""
    box = [value]
    if distributed():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def decided_by_first(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on the first process, on every process; an error there is raised
    on all of them. Collective."""
    value: T | None = None
    failure: Exception | None = None
    if is_first():
        try:
            value = decide()
        except Exception as error:
            failure = error
    agree(failure)
    found: T = from_first(value)
    return found


def gather_to_first(value: Any) -> list[Any]:
    """Return the `value` of every process by rank on the first one, an empty list on the others;
    collective."""
    if not distributed():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []


def gather_to_all(value: Any) -> list[Any]:
    """Return the `value` of every process by rank, on all processes; collective."""
    if not distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree(failure: BaseException | None) -> None:
    """Raise on every process when any of them failed: its own error if it has one, else the first
    error of another process. A SetupError (a full disk) stays a SetupError on all of them, so that
    they end with the same exit code.
    """
    faults = gather_to_all(
        None if failure is None else (isinstance(failure, SetupError), str(failure))
    )
    if failure is not None:
        raise failure
    first = next((fault for fault in faults if fault is not None), None)
    if first is not None:
        of_machine, message = first
        raise (SetupError if of_machine else CheckpointError)(message)


@contextmanager
def failing_together(translate: Callable[[Exception], BaseException]) -> Iterator[None]:
    """Run a block whose failure on one process is raised on all of them, as the error that
    `translate` makes of it there."""
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = translate(error)
    agree(failure)
