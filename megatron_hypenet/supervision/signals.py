"""Requests from outside, handled between steps: SIGTERM, SIGUSR2 (SLURM's warning), SIGINT
(Ctrl-C), SIGHUP (the terminal is gone), and the files SAVE_NOW and STOP.

A signal or STOP means: save, then stop; SAVE_NOW means: save and go on. All processes act on the
same step, whichever received the request. A second Ctrl-C ends the process at once. Signals that
this process was started to ignore (`nohup`, `&` in a script) stay ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_hypenet.errors import SavedAndRequeue
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.agreement import from_first
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.supervision.request_files import SAVE_NOW, stop_file
from megatron_hypenet.terminal import leave_terminal

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

_SHOW_CURSOR = "\x1b[?25h"
_AT_ONCE = "; Ctrl-C again leaves at once"

GO_ON = 0
SAVE = 1
LEAVE = 2
"""Results of `Requests.poll`; the strongest request wins."""

_FILE_CHECK_SECONDS = 1.0


class _StopRequested(BaseException):
    """Raised by the handler of `leaving_at_once`; it is no Exception, so that no `except Exception`
    catches it."""


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Let a signal end the block with SavedAndRequeue (main thread only): for work that keeps what
    it finished by itself.

    A training stage inside it takes the signals over with `Requests`, finishes its step and saves
    first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _prepare_to_leave(number, f"stopping{_AT_ONCE}")
        raise _StopRequested

    previous = _handled_by(leave)
    try:
        yield
    except BaseException as error:
        # a library may have replaced the exception by one of its own, so the received signal
        # decides
        if not received or isinstance(error, SavedAndRequeue):
            raise
        raise SavedAndRequeue(
            f"stopped on {name_of(received[0])}; finished steps are kept, "
            "start the same command again to continue"
        ) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def name_of(number: int) -> str:
    """Return a signal as a person knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _handled_by(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install `handler` for the signals that are not ignored; returns the handlers before it."""
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }


def _prepare_to_leave(number: int, what: str) -> None:
    """Say `what` happens after Ctrl-C, and let the next one end the process; after SIGHUP write
    nothing to the terminal any more, where writing fails."""
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if groups.rank() == 0:
            with contextlib.suppress(OSError):
                # a bar hides the cursor, and the next Ctrl-C leaves no time to show it again
                cursor = _SHOW_CURSOR if os.isatty(2) else ""
                os.write(2, f"{cursor}\n{what}\n".encode())
    elif number == signal.SIGHUP:
        leave_terminal()


def leave_if_stopped(what: str, places: Iterable[Path]) -> None:
    """Raise SavedAndRequeue before `what` begins, on every process, when the first one sees a STOP
    file in one of `places`; collective."""
    stop: Path | None = from_first(stop_file(places))
    if stop is not None:
        raise SavedAndRequeue(
            f"stopped before {what} on the file {stop}; finished steps are kept, "
            "delete it and start the same command again to continue"
        )


class Requests:
    """Context that catches the signals (in the main thread) and watches `folders` for the request
    files."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(dict.fromkeys(folders))
        self.reason = ""
        """Name of the request to stop, on the process that received it."""
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._next_file_check = 0.0

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            self._previous = _handled_by(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        _prepare_to_leave(number, f"stopping: this step is finished and saved first{_AT_ONCE}")

    def poll(self) -> int:
        """Return GO_ON, SAVE or LEAVE, agreed by all processes; call once per step on every one of
        them."""
        request = GO_ON
        if self._received is not None:
            request = LEAVE
            self.reason = name_of(self._received)
        elif groups.rank() == 0 and time.monotonic() >= self._next_file_check:
            self._next_file_check = time.monotonic() + _FILE_CHECK_SECONDS
            request = self._file_request()
        if groups.world_size() == 1:
            return request
        strongest = torch.tensor([request], dtype=torch.int32, device=device())
        dist.all_reduce(strongest, op=dist.ReduceOp.MAX)
        return int(strongest.item())

    def _file_request(self) -> int:
        if (stop := stop_file(self.folders)) is not None:
            self.reason = f"the file {stop} (delete it to continue)"
            return LEAVE
        for folder in self.folders:
            if (folder / SAVE_NOW).exists():
                (folder / SAVE_NOW).unlink(missing_ok=True)
                return SAVE
        return GO_ON
