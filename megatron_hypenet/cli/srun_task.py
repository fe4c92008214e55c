"""What a task of srun does: `srun ... python -m launchers.slurm VERB ARGS...`, one task per GPU.
Not a verb.

HYPENET_ATTEMPT_LOGS   folder of this attempt; a task that fails leaves rank-0003.error.json there
                       for `hypenet logs --first-error`
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from launchers.slurm import place_of
from megatron_hypenet.cli import main as command
from megatron_hypenet.errors import SavedAndRequeue, SetupError
from megatron_hypenet.supervision.fault_record import ATTEMPT_LOGS, attempt_file, record_of


def _leave_before_start(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave when asked to stop while nothing trains here yet, or any more: there is nothing to
    save, and the next start goes on from the disk."""
    sys.stderr.write(f"{signal.Signals(number).name} while no step was running; leaving\n")
    sys.stderr.flush()
    os._exit(SavedAndRequeue.exit_code)


def record_fault(fault: BaseException, environment: Mapping[str, str]) -> None:
    """Leave what ended this task in the attempt's folder, unless a record is there: the engine's
    says more. Being asked to stop is no fault."""
    rank = int(environment["RANK"])
    path = attempt_file(rank, environment)
    if path is None or path.is_file() or isinstance(fault, SavedAndRequeue):
        return
    record_of(fault, rank=rank, environment=environment).write(path)


def run(words: Sequence[str]) -> int:
    """Take this task's place and do the command; returns the exit code."""
    try:
        os.environ.update(place_of(os.environ))
    except SetupError as fault:
        return command.report_fault(fault, debug=False)
    here = {
        name: os.environ[name]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    node = os.environ.get("SLURMD_NODENAME", "?")
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(
        f"node {node} attempt {attempt} "
        f"{' '.join(f'{name}={value}' for name, value in here.items())}",
        file=sys.stderr,
        flush=True,
    )
    try:
        return command.dispatch(list(words))
    except (KeyboardInterrupt, Exception) as fault:
        # a job's task has a log of its own, which has room for the traceback
        code = command.report_fault(
            fault, debug=ATTEMPT_LOGS in os.environ and not isinstance(fault, SavedAndRequeue)
        )
        record_fault(fault, os.environ)
        return code


def main() -> NoReturn:
    """Run the entry point of a task."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _leave_before_start)
    faulthandler.enable()
    code = run(sys.argv[1:])
    from megatron_hypenet.supervision.process_exit import exit_process

    exit_process(code)


if __name__ == "__main__":
    main()
