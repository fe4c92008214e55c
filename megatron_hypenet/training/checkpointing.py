"""Request, commit and prune the loop's checkpoints: at once, or in the background while training
goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.load import newest_of_run
from megatron_hypenet.checkpoint.pending import PendingSave
from megatron_hypenet.checkpoint.retention import prune
from megatron_hypenet.checkpoint.save import begin_save
from megatron_hypenet.checkpoint.state import EngineState, TrainState
from megatron_hypenet.config.schema import CheckpointConfig
from megatron_hypenet.errors import CheckpointError, SetupError
from megatron_hypenet.parallel import groups

logger = logging.getLogger(__name__)


class Saver:
    """The checkpoints of one training stage. At most one save is pending; `committed` is the newest
    from which a run can continue.

    All processes call `save`, `step_boundary` and `settle` in the same steps. Older checkpoints are
    pruned after a commit only.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig) -> None:
        """Find the checkpoint to continue from, and remove what interrupted saves left;
        collective."""
        self.checkpoints = checkpoints
        self.config = config
        self.committed: Path | None = newest_of_run(checkpoints)
        self.note: Callable[[str], None] = lambda text: None
        """Called with a line when a save is requested and when it is committed."""
        self._pending: PendingSave | None = None
        self._requested = 0.0
        self._untold: tuple[Path, float] | None = None
        """What the next `take_commit` returns."""

    def save(self, engine: EngineState, state: TrainState, *, wait: bool, **what: Any) -> None:
        """Save `state`. Without `wait`, and with checkpoint.async_save, this only takes copies: a
        later `step_boundary` commits.

        A save still pending is committed first. Raises SetupError (disk full) or CheckpointError on
        all processes.
        """
        self.settle()
        folder = self.checkpoints / fmt.iteration_name(state.step)
        self._requested = time.perf_counter()
        background = self.config.async_save and not wait
        self._pending = begin_save(folder, engine, state, background=background, **what)
        if background:
            self.note(
                f"requested {folder}: copied in {self._seconds()}, its files are written while "
                "training goes on"
            )
        else:
            self.settle()

    def step_boundary(self) -> None:
        """Commit the pending save if all processes have written their files, without waiting for a
        disk; call it at a step boundary."""
        if self._pending is not None and self._pending.ready():
            self.settle()

    def settle(self) -> None:
        """Wait for the pending save, if there is one, and commit it."""
        if self._pending is None:
            return
        pending = self._pending
        self._pending = None
        self.committed = pending.commit()
        self._untold = (self.committed, time.perf_counter() - self._requested)
        if groups.rank() == 0:
            prune(
                self.checkpoints, keep_last=self.config.keep_last, keep_every=self.config.keep_every
            )
        self.note(f"saved {self.committed} in {self._seconds()}")

    def take_commit(self) -> tuple[Path, float] | None:
        """Return the checkpoint that was committed since the last call, and the seconds from its
        request to its commit; None when none was."""
        commit = self._untold
        self._untold = None
        return commit

    def settle_before_fault(self) -> None:
        """Call `settle` before raising an error that all processes have found in the same step,
        without hiding that error."""
        try:
            self.settle()
        except (CheckpointError, SetupError) as error:
            logger.warning("the save that was being written is lost: %s", error)

    def close(self) -> None:
        """Remove a save that is still pending (after `settle` there is none), without other
        processes."""
        if self._pending is not None:
            self._pending.abandon()
            self._pending = None

    def _seconds(self) -> str:
        return f"{time.perf_counter() - self._requested:.1f}s"
