"""Several processes of one `hypenet` command on this machine, ended together and with the exit code
of the one that failed first.

torch's own launcher turns every failure into exit code 1; callers of `hypenet` need to tell 7
(diverged) from 75 (saved, start again). Rank 0 keeps the streams of the caller. The output of each
other rank goes to a file, which is shown when that rank is the first to fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.errors import PeerError, SavedAndRequeue
from megatron_hypenet.process_place import UNDER_WAY, hypenet_command, place, threads_per_process
from megatron_hypenet.terminal import leave_terminal

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
"""Signals that are handed to every process: they ask a run to save and leave. SIGINT is the
keyboard, which asks once and then insists; SIGHUP comes when the terminal is closed."""

BY_KEYBOARD = 128 + signal.SIGINT
"""Exit code of a start that the keyboard ended at once."""

PEACEFUL = frozenset({0, SavedAndRequeue.exit_code})
"""Codes that all processes agree on before any leaves with them: the others may still be writing,
so they are waited for."""

ECHO = PeerError.exit_code
"""What a process that only lost its partner ends with, too; a code of another process's own says
more, even a moment later."""

TAIL_LINES = 40
LOOPBACK = "127.0.0.1"
"""Address at which the processes of one machine meet; other machines cannot reach it."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class LocalLaunch:
    """`num_processes` processes of one command on this machine."""

    words: tuple[str, ...]
    """The words after `hypenet`."""
    num_processes: int
    grace_seconds: float = 10.0
    """Time the others have to end by themselves after one failed, and again between SIGTERM and
    SIGKILL."""

    def start(self) -> int:
        """Say so, and `run`."""
        gpus = visible_gpus()
        more = f" with {gpus} GPUs" if gpus > self.num_processes else ""
        print(
            f"starting {self.num_processes} processes on this machine{more}",
            file=sys.stderr,
            flush=True,
        )
        return run(self)

    @property
    def command(self) -> tuple[str, ...]:
        """Return the command of every process."""
        return hypenet_command(self.words)

    def environment(
        self, rank: int, port: int, inherited: Mapping[str, str] = os.environ
    ) -> dict[str, str]:
        """Return what is set on top of the inherited environment for one process."""
        count = self.num_processes
        own = place(
            rank=rank,
            world_size=count,
            local_rank=rank,
            local_size=count,
            master=LOOPBACK,
            port=port,
        )
        own[UNDER_WAY] = "1"
        if "OMP_NUM_THREADS" not in inherited:
            own["OMP_NUM_THREADS"] = str(threads_per_process(count))
        return own

    def describe(self) -> dict[str, Any]:
        """Return the exact start, for --dry-run: the command, and what each process's environment
        gets on top of ours."""
        own = [
            {**self.environment(rank, 0), "MASTER_PORT": "a free port"}
            for rank in range(self.num_processes)
        ]
        return {"launcher": "local", "command": shlex.join(self.command), "processes": own}

    def lines(self) -> list[str]:
        """Return `describe` as lines for a person."""
        content = self.describe()
        variables = [
            " ".join(f"{key}={shlex.quote(value)}" for key, value in own.items())
            for own in content["processes"]
        ]
        return [
            f"start on this machine, {self.num_processes} times: {content['command']}",
            *(f"  process {rank}: {text}" for rank, text in enumerate(variables)),
        ]


def run(launch: LocalLaunch) -> int:
    """Start the processes, wait for all, and return the exit code: 0, or that of the first that
    failed by itself (128 + n for signal n).

    Nothing outlives this function, nor this process if it is killed: stragglers and what they
    started are ended with SIGKILL.
    """
    with temporary_folder() as logs, held_port() as port, _Group(launch, logs, port) as group:
        return group.wait()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Reserve a free TCP port of loopback that no other program gets inside the block, while a
    socket with SO_REUSEADDR can listen on it.

    A bound socket that does not listen keeps the port out of the kernel's choice for others.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((LOOPBACK, 0))
        yield holder.getsockname()[1]


class _Group:
    """The running processes. Entering the context starts them and installs signal handlers; leaving
    it ends those that still run."""

    def __init__(self, launch: LocalLaunch, logs: Path, port: int) -> None:
        self.launch = launch
        self.logs = logs
        self.port = port
        self.processes: list[subprocess.Popen[bytes]] = []
        self.running: set[int] = set()
        # (rank, exit code), in the order they ended
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.codes: dict[int, int] = {}
        # the one that decides the exit code, if it is not 0
        self.outcome: tuple[int, int] | None = None
        self.insisted = False  # from then on processes end because we ask
        self.received: list[int] = []
        self.previous: dict[int, Any] = {}
        # held while a process is reaped and while one is signalled; the signal handler may come on
        # top of our own sending
        self.reaping = threading.RLock()

    def __enter__(self) -> _Group:
        if threading.current_thread() is threading.main_thread():
            self.previous = {
                number: signal.signal(number, self._forward)
                for number in FORWARDED
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        try:
            for rank in range(self.launch.num_processes):
                self.processes.append(self._start(rank))
                self.running.add(rank)
                # one thread per process, so that the order in which they end is known
                threading.Thread(target=self._await, args=(rank,), daemon=True).start()
                for number in self.received:  # those that came before this process was there
                    self._send(number, [rank])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGKILL, self.running)
        while self.running:
            self._take(None)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """Wait until all have ended; after a failure the rest gets `grace_seconds`, then SIGTERM,
        then SIGKILL."""
        while self.running and not self._has_failed():
            self._take(None)
        for insist in (None, signal.SIGTERM, signal.SIGKILL):
            if insist is not None:
                self.insisted = True
                self._send(insist, self.running)
            deadline = time.monotonic() + self.launch.grace_seconds
            while self.running and (left := deadline - time.monotonic()) > 0:
                self._take(left)
        if self.outcome is None:
            return 0
        if self.received.count(signal.SIGINT) > 1:
            return BY_KEYBOARD
        rank, code = self.outcome
        # with the same code, rank 0 has said the same on our streams
        if self._has_failed() and self.codes.get(0) != code:
            self._show(rank, code)
        return code

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as stack:
            log = None if rank == 0 else stack.enter_context(self._log(rank).open("wb"))
            return subprocess.Popen(
                self.launch.command,
                env={**os.environ, **self.launch.environment(rank, self.port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # a group of its own: Ctrl-C at the terminal arrives once, through us, and what a
                # process starts can be ended with it
                process_group=0,
                preexec_fn=die_with(os.getpid()),
            )

    def _await(self, rank: int) -> None:
        process = self.processes[rank]
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self.reaping:
            with contextlib.suppress(OSError):
                # what it left behind; its process number is not reused until it is reaped
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        self.ended.put((rank, 128 - code if code < 0 else code))

    def _take(self, timeout: float | None) -> None:
        """Note the next process that ends, if one does within `timeout` seconds."""
        try:
            rank, code = self.ended.get(timeout=timeout)
        except queue.Empty:
            return
        self.running.discard(rank)
        self.codes[rank] = code
        if code and not self._has_failed():
            self.outcome = (rank, code)
        elif (
            self.outcome is not None
            and self.outcome[1] == ECHO
            and code not in {ECHO, *PEACEFUL}
            and not self.insisted
        ):
            self.outcome = (rank, code)

    def _has_failed(self) -> bool:
        return self.outcome is not None and self.outcome[1] not in PEACEFUL

    def _send(self, number: int, ranks: Iterable[int]) -> None:
        for rank in sorted(ranks):
            process = self.processes[rank]
            with self.reaping, contextlib.suppress(OSError):
                if process.returncode is None:
                    os.kill(process.pid, number)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        insisted = self.received.count(signal.SIGINT) > 1
        self._send(signal.SIGKILL if insisted else number, self.running)

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def _show(self, rank: int, code: int) -> None:
        lines = (
            self._log(rank).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        )
        head = (
            f"process {rank} of {self.launch.num_processes} ended first, with code {code}; "
            "its last lines:"
        )
        print("\n".join([head, *lines]), file=sys.stderr)


def die_with(parent: int) -> Callable[[], None] | None:
    """Ask Linux to kill this new process when its parent ends."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before we asked
            os._exit(128 + signal.SIGKILL)

    return ask


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Count the CUDA devices that processes started here would see, without importing torch: 0
    without a working driver."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    present = (
        sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
        if listing.returncode == 0
        else 0
    )
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    # CUDA stops at the first invalid name
    return next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
