"""A command that runs on the hosts of a hostfile, waited for: its output, its signals, and the exit
code of the rank that failed first.

DeepSpeed's launcher and pdsh pass on neither codes nor signals as they are, and leave processes
behind: asked to stop, DeepSpeed kills all jobs of its user on these hosts. So each rank reports its
state in lines of its own (launchers/hostfile_rank.py), signals are sent to rank 0 by ssh, and a job
is ended by closing the connections, which the ranks detect.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

from launchers.hostfile import HostfileLaunch, environment_file, ssh_command, without_secrets
from launchers.hostfile_rank import MARK
from launchers.local import ECHO, FORWARDED, PEACEFUL, TAIL_LINES
from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.errors import SetupError
from megatron_hypenet.terminal import leave_terminal

_DEEPSPEED_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[[A-Z]+\] \[\w+\.py:\d+:\w+\] ")
_HOST_ENDED = re.compile(r"pdsh@[^:]*: (\S+): ssh exited with exit code (\d+)")
_KILLED = 128 + signal.SIGKILL
_SSH_SECONDS = 30
_DRAIN_SECONDS = 60.0
_DRAIN_FAILED_SECONDS = 0.5

_WITH_US = 'exec 3<&0; (read gone <&3; kill -s KILL 0) >/dev/null 2>&1 & exec "$@" </dev/null 3<&-'
"""A shell that becomes its arguments, and kills them and what they start when our end of its input
closes, however we end."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A rank that has started and not ended."""

    host: str
    pid: int
    """Process number of its hostfile_rank process."""


@dataclass(frozen=True, slots=True)
class HostfileStart:
    """The start of a command on the hosts of a hostfile."""

    launch: HostfileLaunch

    def start(self) -> int:
        """Say so, and `run`."""
        print(
            f"starting {self.launch.num_processes} processes on the hosts of "
            f"{self.launch.hostfile}",
            file=sys.stderr,
            flush=True,
        )
        return run(self.launch)

    def describe(self) -> dict[str, Any]:
        """Return the exact start, for --dry-run."""
        return self.launch.describe()

    def lines(self) -> list[str]:
        """Return `describe` as lines for a person."""
        return self.launch.lines()


def run(launch: HostfileLaunch) -> int:
    """Start the command on all hosts, wait for it, and return the exit code as launchers/local.py
    does: that of the rank that failed first.

    When it returns no rank is left on any host that ssh still reaches. Raises SetupError when the
    start or a connection failed.
    """
    with temporary_folder() as folder:
        values = folder / "environment"
        values.touch(mode=0o600)
        values.write_text(environment_file(launch.variables), encoding="utf-8")
        with _Job(launch, values) as job:
            return job.wait()


class _Job:
    """DeepSpeed's launcher and what is known of the ranks. Leaving the context ends all that still
    runs."""

    def __init__(self, launch: HostfileLaunch, values: Path) -> None:
        self.launch = launch
        self.values = values
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.running: dict[int, _Running] = {}
        self.codes: dict[int, int] = {}
        self.tails: dict[int, list[str]] = {}
        self.hosts = [host.name for host in launch.hosts for _ in range(host.slots)]  # of each rank
        self.outcome: tuple[int, int] | None = None  # (rank, code) that decides, if it is not 0
        self.lost: str = ""  # what is said of a connection that ended before its ranks
        self.unheard: list[int] = []  # signals that came before a rank was there
        self.interrupts = 0
        self.over: int | None = None  # how DeepSpeed's launcher ended
        # what DeepSpeed and pdsh say
        self.notes: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _Job:
        if threading.current_thread() is threading.main_thread():
            self.previous = {
                number: signal.signal(number, self._note_signal)
                for number in FORWARDED
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        self.process = subprocess.Popen(
            ["sh", "-c", _WITH_US, "sh", *self.launch.command],
            env={
                **without_secrets(os.environ),
                "DS_ENV_FILE": str(self.values),
                "PDSH_SSH_ARGS_APPEND": self.launch.ssh_options,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C at the terminal arrives once, here
        )
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self.readers = [
            threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams
        ]
        for reader in self.readers:
            reader.start()
        threading.Thread(target=self._await, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_ranks()
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # pdsh with it, and so the connections
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        for reader in self.readers:
            reader.join(timeout=5)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """Wait until every rank has reported its end; after a failure the others get
        `grace_seconds`. Raises SetupError as `run` says."""
        deadline: float | None = None
        while (
            self.over is None
            and len(self.codes) < self.launch.num_processes
            and self.interrupts < 2
        ):
            if deadline is None and (
                self.lost or (self.outcome and self.outcome[1] not in PEACEFUL)
            ):
                deadline = time.monotonic() + self.launch.grace_seconds
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._take(left)
        # what was said at the very end comes on two streams, and does not overtake the end of
        # DeepSpeed's launcher
        done = self.outcome is None and len(self.codes) == self.launch.num_processes
        deadline = time.monotonic() + (_DRAIN_SECONDS if done else _DRAIN_FAILED_SECONDS)
        while (self.over is None or not self.events.empty()) and (
            left := deadline - time.monotonic()
        ) > 0:
            self._take(left)
        return self._verdict()

    def _verdict(self) -> int:
        if self.outcome is not None and not (self.lost and self.outcome[1] == ECHO):
            rank, code = self.outcome
            # with the same code, rank 0 has said the same on our streams
            if code not in PEACEFUL and self.codes.get(0) != code:
                killed = (
                    " (SIGKILL: out of memory, which the kernel's log there would show, "
                    "or killed by hand)"
                    if code == _KILLED
                    else ""
                )
                head = (
                    f"process {rank} of {self.launch.num_processes}, on {self.hosts[rank]}, "
                    f"ended first, with code {code}{killed}"
                )
                print(
                    "\n".join(
                        [f"{head}; its last lines:", *self.tails[rank]]
                        if self.tails[rank]
                        else [head]
                    ),
                    file=sys.stderr,
                )
            return code
        if len(self.codes) == self.launch.num_processes:
            return 0
        if self.interrupts:
            return 128 + signal.SIGINT
        notes = "\n".join(f"  {line}" for line in self.notes)
        what = (
            self.lost
            or f"DeepSpeed's launcher ended with code {self.over} before the processes did"
        )
        raise SetupError(f"{what}; it and pdsh said last:\n{notes}")

    def _take(self, timeout: float | None) -> None:
        """Handle the next event, if one comes within `timeout` seconds."""
        try:
            event = self.events.get(timeout=timeout)
        except queue.Empty:
            return
        match event["event"]:
            case "started":
                self.running[event["rank"]] = _Running(self.hosts[event["rank"]], event["pid"])
                if event["rank"] == 0 and self.unheard:
                    self._signal(self.unheard.pop(), [self.running[0]])
            case "ended":
                self._end_of(event["rank"], event["code"], event["tail"])
            case "host":
                if event["code"] and not self._heard_of(event["host"]):
                    self.lost = (
                        f"the connection to {event['host']} ended with code {event['code']} before "
                        "its processes did"
                    )
            case "signal":
                self._forward(event["number"])
            case "over":
                self.over = event["code"]

    def _end_of(self, rank: int, code: int, tail: list[str]) -> None:
        self.running.pop(rank, None)
        self.codes[rank] = code
        self.tails[rank] = tail
        before = self.outcome[1] if self.outcome else 0
        # as in launchers/local.py: the first failure counts, but one of a process's own outweighs
        # an echo
        if code and (before in PEACEFUL or (before == ECHO and code not in {ECHO, *PEACEFUL})):
            self.outcome = (rank, code)

    def _heard_of(self, host: str) -> bool:
        """Return whether all ranks of `host` have ended by themselves."""
        return all(
            rank in self.codes
            for rank, name in enumerate(self.hosts)
            if name.rpartition("@")[2] == host
        )

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        self.events.put({"event": "signal", "number": number})

    def _forward(self, number: int) -> None:
        """Hand a signal to rank 0; the ranks agree among themselves on what one of them was
        asked."""
        self.interrupts += number == signal.SIGINT
        if 0 in self.running:
            self._signal(number, [self.running[0]])
        elif 0 not in self.codes:
            self.unheard.append(number)

    def _signal(self, number: int, ranks: Iterable[_Running]) -> None:
        """Signal processes on their hosts, one ssh for each host, all at once."""
        pids: dict[str, list[str]] = {}
        for entry in ranks:
            pids.setdefault(entry.host, []).append(str(entry.pid))
        name = signal.Signals(number).name.removeprefix("SIG")

        def send(host: str) -> None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                command = ssh_command(host, "kill", "-s", name, *pids[host])
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_SSH_SECONDS,
                    check=False,
                )

        if pids:
            with concurrent.futures.ThreadPoolExecutor(max_workers=64) as pool:
                list(pool.map(send, pids))

    def _end_ranks(self) -> None:
        """Kill the ranks that have not ended by themselves: with its hostfile_rank process goes the
        command."""
        self._signal(signal.SIGKILL, self.running.values())

    def _read(self, stream: IO[bytes], ours: TextIO) -> None:
        """Pass on the output of the ranks, keep that of DeepSpeed and pdsh, and record the ranks'
        reports."""
        for content in stream:
            line = content.decode(errors="replace")
            before, mark, event = line.partition(MARK)
            if mark:
                line = before
                with contextlib.suppress(ValueError):
                    self.events.put(json.loads(event))
            if ended := _HOST_ENDED.match(line):
                self.events.put(
                    {"event": "host", "host": ended.group(1), "code": int(ended.group(2))}
                )
            if ended or _DEEPSPEED_LINE.match(line) or line.startswith("pdsh@"):
                self.notes.append(line.rstrip())
            elif line:
                ours.write(line)
                ours.flush()

    def _await(self) -> None:
        code = self.process.wait()
        for reader in self.readers:
            reader.join()
        self.events.put({"event": "over", "code": code})
