"""The record of the fault that ended one process of a run: one schema and one writer, without
torch.

A process leaves <run folder>/errors/rank_00000.json, and under SLURM rank-0000.error.json in the
folder of its attempt's logs, where the job script and `hypenet logs` look:

    life                          start of the run it belongs to, as in heartbeat/
    time, host, rank              when (seconds since 1970) and where
    stage, phase, iteration       what the process was doing; iteration are finished steps
    train_iters                   of as many; 0 outside training stages
    type, error, traceback, code  the fault, and the exit code it leads to
    echo                          true when it only tells of another process's end

Fields of the run are empty in the record of a task that failed before the run began.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.errors import DataError, HypenetError, exit_code_of
from megatron_hypenet.process_place import host_name
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_typed

ATTEMPT_LOGS = "HYPENET_ATTEMPT_LOGS"
"""Variable with the folder of the logs of this start of a SLURM job."""

_KIND = FileKind(error=DataError, advice="it is only for people")


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRecord:
    """The content of one file."""

    life: str
    time: float
    host: str
    rank: int
    stage: str
    phase: str
    iteration: int
    train_iters: int
    type: str
    error: str
    code: int
    echo: bool
    traceback: str

    def write(self, path: Path) -> None:
        """Write the file; on a full disk the record is lost, but the message is still printed."""
        with contextlib.suppress(OSError):
            write_text(path, json.dumps(asdict(self), indent=2) + "\n", durable=False)


def record_of(
    fault: BaseException,
    *,
    rank: int,
    environment: Mapping[str, str] = os.environ,
    life: str = "",
    stage: str = "",
    phase: str = "",
    iteration: int = 0,
    train_iters: int = 0,
    echo: bool = False,
) -> FaultRecord:
    """Return the record of `fault` in this process; what has a default is for a run to say."""
    return FaultRecord(
        life=life,
        time=time.time(),
        host=host_name(environment),
        rank=rank,
        stage=stage,
        phase=phase,
        iteration=iteration,
        train_iters=train_iters,
        type=type(fault).__name__,
        error=f"{fault}" if isinstance(fault, HypenetError) else f"{type(fault).__name__}: {fault}",
        code=exit_code_of(fault),
        echo=echo,
        traceback="".join(traceback.format_exception(fault)),
    )


def attempt_file(rank: int, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the record beside the logs of a SLURM job; None outside one."""
    logs = environment.get(ATTEMPT_LOGS)
    return None if logs is None else Path(logs, f"rank-{rank:04d}.error.json")


def read_record(path: Path) -> FaultRecord | None:
    """Return the content of a file; None when it is missing or incomplete."""
    try:
        return read_typed(_KIND, path, FaultRecord)
    except DataError:
        return None
