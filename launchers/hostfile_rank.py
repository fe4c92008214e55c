"""The process that DeepSpeed's launcher starts for every slot of a hostfile: it takes its rank from
the environment, and runs the command in a child process.

    python -m launchers.hostfile_rank WORD...

DeepSpeed and pdsh do not pass exit codes on as they are. So this process reports to the one that
waits for the job when its command starts and with which code it ends, in lines on stderr that
launchers/hostfile_job.py filters out. The output of rank 0 is passed on; that of the others goes to
a file, whose last lines are reported when one fails. When the connection ends, the command is
killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any, NoReturn

from launchers.hostfile import unpacked
from launchers.local import FORWARDED, PEACEFUL, TAIL_LINES, die_with
from megatron_hypenet.errors import SetupError
from megatron_hypenet.process_place import UNDER_WAY, hypenet_command, place, threads_per_process

MARK = "hypenet-rank "
"""Begins a line for the waiting process; JSON follows."""

_LONGEST_LINE = 4000  # below PIPE_BUF: the lines of several processes never mix
_LINGER_SECONDS = 20.0
_LINGER_SAVED_SECONDS = 600.0
_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


def environment_of(given: Mapping[str, str]) -> dict[str, str]:
    """Return what DeepSpeed says of this process's place, in the words of the other launchers, and
    the threads it may use. Raises SetupError."""
    try:
        rank, world_size, local_rank, local_size = (
            int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
        master = given["MASTER_ADDR"]
        port = int(given["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise SetupError(
            f"DeepSpeed's launcher did not say where this process belongs: {error}"
        ) from error
    try:
        socket.getaddrinfo(master, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(
            f"the first host's address {master!r} cannot be looked up on {socket.gethostname()}: "
            f"{error}. Rank 0 listens there; write an "
            "address into the hostfile that all hosts know"
        ) from error
    own = place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        master=master,
        port=port,
    )
    own[UNDER_WAY] = "1"
    return (
        own
        if "OMP_NUM_THREADS" in given
        else {**own, "OMP_NUM_THREADS": str(threads_per_process(local_size))}
    )


def report(event: str, **fields: Any) -> None:
    """Send one line to the process that waits for the job; `tail` is cut to what fits."""
    line = json.dumps({"event": event, **fields})
    while len(line) > _LONGEST_LINE and fields.get("tail"):
        fields["tail"] = fields["tail"][1:]
        line = json.dumps({"event": event, **fields})
    with contextlib.suppress(OSError):
        os.write(2, f"{MARK}{line}\n".encode())


class _Rank:
    """The command of one rank, and the signals and the connection that may end it."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.process: subprocess.Popen[bytes] | None = None
        self.pending: list[int] = []
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def run(self, environment: Mapping[str, str]) -> int:
        """Wait until the command has ended and the waiting process knows; returns its code, 128 + n
        for signal n."""
        rank = int(environment.get("RANK", "-1"))
        report("started", rank=rank, pid=os.getpid())
        try:
            own = environment_of(environment)
        except SetupError as fault:
            code = fault.exit_code
            tail = [f"error: {fault}"]
        else:
            with contextlib.nullcontext() if rank == 0 else tempfile.TemporaryFile() as log:
                code = self._await({**environment, **own}, log)
                tail = _last_lines(log) if log is not None and code not in PEACEFUL else []
        report("ended", rank=rank, code=code, tail=tail)
        if code:
            # with this process DeepSpeed would end the others of this host, which may still be
            # writing; the waiting process says when
            _wait_for_hangup(None, _LINGER_SAVED_SECONDS if code in PEACEFUL else _LINGER_SECONDS)
        return code

    def _await(self, environment: Mapping[str, str], log: IO[bytes] | None) -> int:
        process = subprocess.Popen(
            hypenet_command(self.words),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            preexec_fn=die_with(os.getpid()),
        )
        self.process = process
        for number in self.pending:
            self._forward(number, None)
        ended = os.pidfd_open(process.pid)
        _wait_for_hangup(ended, None)
        os.close(ended)
        with contextlib.suppress(OSError):
            # the whole group when the waiting process has ended, else what the command left behind
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        return 128 - code if code < 0 else code

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self.process is None:
            self.pending.append(number)
        elif self.process.returncode is None:
            self.process.send_signal(number)


def _wait_for_hangup(ended: int | None, seconds: float | None) -> None:
    """Return when the connection is gone, the descriptor `ended` is ready, or after `seconds`."""
    poll = select.poll()
    if ended is not None:
        poll.register(ended, select.POLLIN)
    if _is_stream(0):
        poll.register(0, select.POLLIN | _HANGUP)
    if _is_stream(1):
        poll.register(1, _HANGUP)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = poll.poll(None if left is None else 1000 * left)
        if not ready or any(
            number != 0 or events & _HANGUP or not os.read(0, 4096) for number, events in ready
        ):
            return


def _is_stream(number: int) -> bool:
    """Return whether this descriptor is a connection, as ssh's is, whose end can be detected."""
    try:
        mode = os.fstat(number).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _last_lines(log: IO[bytes]) -> list[str]:
    log.seek(0)
    return log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def main() -> NoReturn:
    """Run the entry point of a slot."""
    sys.exit(_Rank([unpacked(word) for word in sys.argv[1:]]).run(os.environ))


if __name__ == "__main__":
    main()
