"""A save on its way: planned by all processes at a step's edge, written by each alone, committed by
all at a later edge.

The writing may run in a background thread while training goes on. It touches nothing but the copies
taken at the start and this process's own files, and never communicates: that every process is done
is agreed by a collective which all of them call in the same step. Until the commit renames it, the
folder has a temporary name that no reader takes.
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
"""How long a process that leaves after a fault waits for its writer: a disk that hangs must not
keep it."""


class PendingSave:
    """One save of a training run, from its request to its commit; `save.begin_save` makes it.

    Every process calls `ready` and `commit` in the same step. `abandon` is for leaving after a
    fault and needs nobody else.
    """

    def __init__(
        self, folder: Path, temporary: Path, *, overwrite: bool, manifest: dict[str, Any]
    ) -> None:
        """`temporary` exists; `manifest` holds write_manifest's keywords other than `known`."""
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
        """A planned part, to be written by this process in the order of adding."""
        self._planned.append(part)

    def add_small_files(self, write: Callable[[], None]) -> None:
        """What the first process writes beside the parts, after them."""
        self._small_files = write

    def write(self) -> None:
        """Write this process's share of what has been added since the last call; a failure is kept
        for the next edge."""
        if self._failure is not None:
            return
        try:
            for part in self._planned[len(self._written) :]:
                self._written.append(part.write(cancelled=self._cancelled.is_set))
        except Exception as error:
            self._failure = error

    def write_in_background(self) -> None:
        """Start writing everything in a thread of its own; nothing may be added any more."""
        # A daemon: a process that ends without `commit` or `abandon` must not wait for a disk.
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
        """Whether `commit` would not wait: all processes have written their files, or one has
        failed. Collective."""
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

        When any process failed, all raise (SetupError for a full disk, CheckpointError), nothing of
        this save stays, and older checkpoints are untouched.
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
        """The first process: indices, manifest, marker, rename."""
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
        """Give the save up without anybody else: stop this process's writer, and remove the folder
        on the first process."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        if is_first():  # what a straggling process still writes there goes at the next start
            shutil.rmtree(self.temporary, ignore_errors=True)
