"""A save in progress: planned by all processes at a step boundary, written by each process by
itself, committed by all at a later step boundary.

The writing may run in a background thread while training goes on. It uses only the copies taken at
the start and this process's own files, and never communicates: a collective, which all processes
call in the same step, agrees that every process is done. Until the commit renames it, the folder
has a temporary name that readers ignore.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import write_manifest
from megatron_hypenet.checkpoint.shard_writer import ShardWrite, Written
from megatron_hypenet.parallel.agreement import (
    agree,
    distributed,
    failing_together,
    gather_to_first,
    is_first,
)
from megatron_hypenet.parallel.cpu import device

_WRITTEN = 0
_WRITING = 1
_FAILED = 2
_PATIENCE_SECONDS = 60.0
"""How long a process that ends after a fault waits for its writer, in case the disk hangs."""


class PendingSave:
    """One save of a training run, from its request to its commit; `save.begin_save` makes it.

    Every process calls `ready` and `commit` in the same step. `abandon` is for the end after a
    fault and needs no other process.
    """

    def __init__(
        self, folder: Path, temporary: Path, *, overwrite: bool, manifest: dict[str, Any]
    ) -> None:
        """Take an existing folder `temporary`, and in `manifest` write_manifest's keywords other
        than `known`."""
        self.folder = folder
        self.temporary = temporary
        self.overwrite = overwrite
        self.manifest = manifest
        self._planned: list[ShardWrite] = []
        self._written: list[Written] = []
        self._small_files: Callable[[], None] = lambda: None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()

    def add(self, part: ShardWrite) -> None:
        """Add a planned part; this process writes its parts in the order of adding."""
        self._planned.append(part)

    def add_small_files(self, write: Callable[[], None]) -> None:
        """Set the function by which the first process writes the small files, after the parts."""
        self._small_files = write

    def write(self) -> None:
        """Write this process's share of what has been added since the last call; a failure is kept
        for the next step boundary."""
        if self._failure is not None:
            return
        try:
            for part in self._planned[len(self._written) :]:
                self._written.append(part.write(cancelled=self._cancelled.is_set))
        except Exception as error:
            self._failure = error

    def write_in_background(self) -> None:
        """Start writing everything in a thread; nothing may be added afterwards."""
        # A daemon thread: a process that ends without `commit` or `abandon` must not wait for a
        # disk.
        self._thread = threading.Thread(
            target=self._write_all, name=f"save-{self.folder.name}", daemon=True
        )
        self._thread.start()

    def _write_all(self) -> None:
        self.write()
        self._write_small_files()

    def _write_small_files(self) -> None:
        try:
            if is_first() and self._failure is None:
                self._small_files()
        except Exception as error:
            self._failure = error

    def ready(self) -> bool:
        """Return whether `commit` would not wait: all processes have written their files, or one
        has failed. Collective."""
        state = (
            _FAILED
            if self._failure is not None
            else _WRITING
            if self._thread is not None and self._thread.is_alive()
            else _WRITTEN
        )
        if distributed():
            worst = torch.tensor([state], dtype=torch.int32, device=device())
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            state = int(worst.item())
        return state != _WRITING

    def commit(self) -> Path:
        """Wait for all writers, then make the checkpoint visible; returns its folder. Collective.

        When any process failed, all raise (SetupError for a full disk, CheckpointError), this save
        is removed, and older checkpoints are untouched.
        """
        try:
            if self._thread is not None:
                self._thread.join()
            else:
                self._write_small_files()
            agree(
                fmt.as_checkpoint_error(self._failure, self.folder)
                if self._failure is not None
                else None
            )
            with failing_together(fmt.error_of_save(self.folder)):
                self._finish(gather_to_first(self._written))
        except BaseException:
            self.abandon()
            raise
        return self.folder

    def _finish(self, gathered: list[list[Written]]) -> None:
        """Write indices, manifest and marker, and rename the folder; on the first process."""
        if not is_first():
            return
        known = {}
        for at, part in enumerate(self._planned):
            part.finish([own[at] for own in gathered])
            for writer, own in enumerate(gathered):
                file = own[at].file
                if file is not None:
                    known[f"{part.folder.name}/{part.name_of(writer)}"] = file
        write_manifest(self.temporary, known=known, **self.manifest)
        fmt.commit(self.temporary, self.folder, overwrite=self.overwrite)

    def abandon(self) -> None:
        """Give the save up without other processes: stop this process's writer, and remove the
        folder on the first process."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        if is_first():  # the next start removes what a slower process still writes there
            shutil.rmtree(self.temporary, ignore_errors=True)
