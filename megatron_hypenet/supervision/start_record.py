"""The last start of a run: <run folder>/start.json, written by its first process when it begins and
when it ends, without torch.

`hypenet status` says with it why a run does not go on, and how it would. A process that was killed
leaves the state `running`; whether it runs is then found out as for the owner of the folder
(ownership.py).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.errors import (
    INTERRUPTED,
    DataError,
    HypenetError,
    SavedAndRequeue,
    exit_code_of,
)
from megatron_hypenet.process_place import host_name
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_typed

FILE = "start.json"
_KIND = FileKind(error=DataError, advice="it is written at the next start", max_bytes=1 << 20)
_LONGEST_REASON = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRecord:
    """The content of the file; times are seconds since 1970 by the clock of `host`."""

    command: str
    """The command line, as a shell takes it."""
    folder: str
    """Where it was given."""
    host: str
    pid: int
    processes: int
    job: str = ""
    """SLURM job, "" outside of one."""
    began: float
    state: str = "running"
    """running; at the end done, stopped (saved on request) or failed."""
    ended: float | None = None
    reason: str = ""
    """The error that ended it."""
    code: int = 0


@contextmanager
def recorded(root: Path, words: Sequence[str], processes: int) -> Iterator[None]:
    """Note the start of `hypenet WORDS` in the run folder `root`, and its end with the block. On a
    full disk the record is lost."""
    record = StartRecord(
        command=shlex.join(["hypenet", *words]),
        folder=os.getcwd(),
        host=host_name(),
        pid=os.getpid(),
        processes=processes,
        job=os.environ.get("SLURM_JOB_ID", ""),
        began=round(time.time(), 3),
    )
    _write(root, record)
    try:
        yield
    except BaseException as fault:
        text = str(fault) if isinstance(fault, HypenetError) else f"{type(fault).__name__}: {fault}"
        code = exit_code_of(fault)
        _write(
            root,
            replace(
                record,
                state="stopped" if isinstance(fault, SavedAndRequeue) else "failed",
                ended=round(time.time(), 3),
                reason=("interrupted from the keyboard" if code == INTERRUPTED else text)[
                    :_LONGEST_REASON
                ],
                code=code,
            ),
        )
        raise
    _write(root, replace(record, state="done", ended=round(time.time(), 3)))


def read_start(root: Path) -> StartRecord | None:
    """Return the last start of the run in folder `root`; None where none is recorded."""
    try:
        return read_typed(_KIND, root / FILE, StartRecord)
    except DataError:
        return None


def _write(root: Path, record: StartRecord) -> None:
    with contextlib.suppress(OSError):
        write_json(root / FILE, asdict(record))
