"""Run the commands of the user that ask for events of a run: `on_event` of its configuration.

Each is a line for the shell, which gets in its environment

    HYPENET_EVENT    stage_done, run_done, stopped, failed; requeued by the job script of SLURM
    HYPENET_RUN      the run folder
    HYPENET_STEP     the step, where the event is of one
    HYPENET_MESSAGE  what happened, in words

It runs on the first process, or on the first node of a job, while the run waits for it at most
TIMEOUT_SECONDS. A command that fails is a warning in the log, and nothing more.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_hypenet.errors import HypenetError, SavedAndRequeue

logger = logging.getLogger(__name__)

STAGE_DONE = "stage_done"
RUN_DONE = "run_done"
STOPPED = "stopped"
FAILED = "failed"

TIMEOUT_SECONDS = 60.0


def run_commands(
    commands: Sequence[str],
    event: str,
    *,
    root: Path,
    step: str = "",
    message: str = "",
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Run `commands`, one after the other, about an `event` of the run in folder `root`."""
    own = {
        "HYPENET_EVENT": event,
        "HYPENET_RUN": str(root.absolute()),
        "HYPENET_STEP": step,
        "HYPENET_MESSAGE": message,
    }
    for command in commands:
        try:
            done = subprocess.run(
                ["sh", "-c", command],
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.warning("on_event: %s (%s): %s", command, event, error)
            continue
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            logger.warning(
                "on_event: %s (%s) ended with code %d%s",
                command,
                event,
                done.returncode,
                f": {said[-1]}" if said else "",
            )


@contextmanager
def commands_at_end(commands: Sequence[str], root: Path) -> Iterator[None]:
    """Run the block, and then `commands` if it ends by a stop or a fault."""
    try:
        yield
    except BaseException as fault:
        event = STOPPED if isinstance(fault, SavedAndRequeue) else FAILED
        text = str(fault) if isinstance(fault, HypenetError) else f"{type(fault).__name__}: {fault}"
        run_commands(commands, event, root=root, message=text)
        raise
