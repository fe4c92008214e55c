"""Run HALO's tasks: each once for the same inputs, so that starting a run again continues it where
it stopped.

actions.py has what the tasks do. This module decides when a task has to be done, in which order,
and by which process. A task is called step here.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import (
    WEIGHTS_PARTS,
    FileEntry,
    git_commit,
    hash_file,
    is_as_written,
    library_versions,
    verify_files,
)
from megatron_hypenet.config.loader import default_settings
from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.data.pairs import token_paths
from megatron_hypenet.data.sources import is_pattern
from megatron_hypenet.errors import CheckpointError, DataError
from megatron_hypenet.halo.fingerprints import (
    content_of,
    fingerprint_of,
    flat_settings,
    settled,
)
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.untrusted import json_text
from megatron_hypenet.untrusted.files import FileKind

logger = logging.getLogger(__name__)

_RESULT = FileKind(error=DataError, advice="delete it to make it again")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step (task) of a run: its inputs, its results, and its action."""

    name: str
    does: str
    """Short description for the plan and the progress line."""
    after: tuple[str, ...]
    """Steps whose results it reads."""
    settings: tuple[str, ...]
    """Sections of the run configuration that shape its result."""
    results: tuple[Path, ...]
    """Paths that must exist once it is done."""
    action: Callable[[], dict[str, Any]]
    """The work; its return value is recorded beside the step."""
    inputs: Callable[[], Any] = field(default=lambda: None)
    """Content of files outside the run's own steps, for the fingerprint."""
    alone: bool = False
    """True when the first process does it while the others wait."""
    checkpoint: Callable[[], Path | None] | None = None
    """Returns the checkpoint that the step leaves, or None when it is not complete; None for steps
    that leave none."""
    files: Callable[[], Iterable[Path]] = tuple
    """Returns the files in its results that are recorded with their hashes: those that belong to no
    checkpoint. Damaged, they are written again."""
    decides: bool = True
    """False for a step that only checks: what comes after it depends on what comes before it."""
    length: int | None = None
    """Optimizer steps of a training stage; a stage may be lengthened."""
    decay: int | None = None
    """Steps until its learning rate has reached the end of its cosine; None where it is
    constant."""


class Runner:
    """Runs steps in order inside a run folder, and records which are done."""

    def __init__(
        self,
        run: RunConfig,
        folder: RunFolder,
        steps: Sequence[Step],
        *,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
        announce: Callable[[str, str], None] = lambda step, what: None,
        may_start: Callable[[str], None] = lambda step: None,
        limited: Callable[[set[str]], None] = lambda steps: None,
        decided: Callable[[Callable[[], Any]], Any] = lambda decide: decide(),
        verify: Callable[[Path], Any] = lambda checkpoint: verify_files(
            checkpoint, hashes=True, parts=WEIGHTS_PARTS
        ),
    ) -> None:
        """Take callbacks that all processes call in the same order:

        - `announce(step, what)` is called for every step: "skipped", "starts" or "done in 12.3 s".
        - `limited(steps)` is called when no other steps than these will be done.
        - `may_start(step)` is called before a step that has work to do, and may end the run by
          raising.
        - `decided(decide)` returns the result of `decide` on the first process.
        - `verify(checkpoint)` compares the weights of a finished step with their hashes.
          CheckpointError.
        """
        self.run = run
        self.folder = folder
        self.steps = {step.name: step for step in steps}
        self.is_main = is_main
        self.barrier = barrier
        self.announce = announce
        self.may_start = may_start
        self.limited = limited
        self.decided = decided
        self.verify = verify
        self.settings = run.model_dump(mode="json")
        flat = flat_settings(self.settings)
        default = flat_settings(default_settings())
        # a setting that came later has no part in fingerprints as long as it is left alone
        self.added = frozenset(
            key for key in folder.added_settings(run) if flat.get(key) == default.get(key)
        )

    def fingerprint(self, name: str) -> str:
        """Return the hash of everything that decides the result of step `name`, its predecessors
        included, as they are now."""
        return self._whole(self.steps[name], self.basis(name))

    def basis(self, name: str) -> str:
        """Return the fingerprint of step `name` without the number of its optimizer steps: what a
        longer stage has in common with the shorter one that it continues."""
        found: dict[str, str] = {}  # every predecessor is computed once
        for before, step in self.steps.items():
            if before in self.needed_for(name):
                settings = {section: self.settings[section] for section in step.settings}
                lengths = {f"{before}.{key}" for key in ("train_iters", "lr_decay_iters")}
                found[before] = fingerprint_of(
                    {
                        "step": before,
                        "settings": settled(settings, without=self.added | lengths),
                        "inputs": step.inputs(),
                        "after": [
                            self._whole(self.steps[earlier], found[earlier])
                            for earlier in self.deciding(step)
                        ],
                        **({} if step.decay is None else {"decay": step.decay}),
                    }
                )
        return found[name]

    @staticmethod
    def _whole(step: Step, basis: str) -> str:
        """Return the fingerprint of `step` from its basis."""
        if step.length is None:
            return basis
        return fingerprint_of({"basis": basis, "train_iters": step.length})

    def deciding(self, step: Step) -> list[str]:
        """Return the names of the steps whose results decide that of `step`: in the place of a
        check, what the check itself comes after."""
        found: dict[str, None] = {}  # a check may come after a step that is named beside it
        for earlier in step.after:
            before = self.steps[earlier]
            found |= dict.fromkeys([earlier] if before.decides else self.deciding(before))
        return list(found)

    def is_done(self, name: str) -> bool:
        """Return whether step `name` needs no work: it finished with the present inputs, and its
        results exist, with a complete checkpoint and with the files that it wrote."""
        return self._has_finished(name, self.fingerprint(name)) and not self._damaged(name)

    def _has_finished(self, name: str, fingerprint: str) -> bool:
        step = self.steps[name]
        return self.folder.is_done(name, fingerprint, step.results) and (
            step.checkpoint is None or step.checkpoint() is not None
        )

    def _damaged(self, name: str) -> list[Path]:
        """Return the files of a finished step that are missing or not as it wrote them; the log
        names them."""
        written = self.folder.records()[name].get("written", {})
        found = {self._relative(path): path for path in self.steps[name].files()}
        damaged = [
            self.folder.root / file
            for file, entry in written.items()
            if file not in found or not is_as_written(found[file], FileEntry(**entry))
        ]
        for path in damaged:
            logger.warning("%s is not as step %s wrote it; the step is done again", path, name)
        return damaged

    def _written(self, step: Step) -> dict[str, dict[str, Any]]:
        """Return size and hash of the files that a step has just written, as they are recorded."""
        return {self._relative(path): asdict(hash_file(path)) for path in step.files()}

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder.root).as_posix()

    def run_through(self, last: str) -> None:
        """Do every step up to and including `last` that `last` depends on and that is not done."""
        wanted = self.needed_for(last)
        self.limited(wanted)
        for name in self.steps:
            if name in wanted:
                self.run_step(name)

    def run_all(self) -> None:
        """Do every step that is not done."""
        for name in self.steps:
            self.run_step(name)

    def run_step(self, name: str) -> None:
        """Do one step unless it is done; results of an earlier attempt with other inputs, and
        damaged ones, are removed, an attempt with the same inputs is continued."""
        step = self.steps[name]

        def decide() -> tuple[str, bool, bool, Path | None]:
            fingerprint = self.fingerprint(name)
            finished = self._has_finished(name, fingerprint)
            damaged = finished and bool(self._damaged(name))
            done = finished and not damaged
            return (
                fingerprint,
                done,
                damaged,
                step.checkpoint() if done and step.checkpoint is not None else None,
            )

        fingerprint, done, damaged, checkpoint = self.decided(decide)
        if done:
            if checkpoint is not None:
                self.verify(checkpoint)
            self.announce(name, "skipped")
            return
        self.may_start(name)
        if self.is_main:
            basis = self.basis(name)
            if damaged or not self.goes_on(name, basis):
                for result in step.results:
                    remove(result)
            self.folder.begin(name, basis)
        self.barrier()
        self.announce(name, "starts")
        PROGRESS.begin(name)
        if step.alone:
            PROGRESS.note("alone" if self.is_main else "waiting")
        start = time.monotonic()
        details = step.action() if self.is_main or not step.alone else {}
        self.barrier()
        seconds = time.monotonic() - start
        if self.is_main:
            missing = [str(path) for path in step.results if not path.exists()]
            if missing:
                raise CheckpointError(
                    f"step {name} ended without {', '.join(missing)}; start the same command again"
                )
            if step.checkpoint is not None and step.checkpoint() is None:
                raise CheckpointError(
                    f"step {name} ended without a whole checkpoint in {step.results[0]}; "
                    "start the same command again"
                )
            if written := self._written(step):
                details = {**details, "written": written}
            self.folder.record(name, fingerprint, seconds=seconds, software=software(), **details)
        self.barrier()
        self.announce(name, f"done in {seconds:.1f} s")

    def goes_on(self, name: str, basis: str) -> bool:
        """Return whether step `name` continues what an earlier attempt left: it was started with
        the same `basis`, and has not trained for longer than is now asked."""
        return self.folder.started(name) == basis and not self.trained_longer(name)

    def trained_longer(self, name: str) -> bool:
        """Return whether training stage `name` has a checkpoint of a later step than its last
        one."""
        step = self.steps[name]
        return step.length is not None and any(
            (fmt.iteration_of(folder) or 0) > step.length
            for folder in fmt.iteration_folders(step.results[0] / fmt.CHECKPOINTS)
        )

    def plan(self) -> list[dict[str, Any]]:
        """Return every step with its state, for --dry-run; writes nothing. A step whose inputs do
        not exist yet counts as not done."""
        rows = []
        ready = True
        for name, step in self.steps.items():
            ready = ready and self._is_done_quietly(name)
            rows.append(
                {
                    "step": name,
                    "does": step.does,
                    "state": "done" if ready else "to do",
                    "results": [str(p) for p in step.results],
                }
            )
        return rows

    def _is_done_quietly(self, name: str) -> bool:
        try:
            return self.is_done(name)
        except (CheckpointError, DataError, OSError):
            return False

    def needed_for(self, last: str) -> set[str]:
        """Return the names of the steps that `last` depends on, and its own."""
        needed = {last}
        for name in reversed(self.steps):
            if name in needed:
                needed.update(self.steps[name].after)
        return needed


def software() -> dict[str, Any]:
    """Return the code and libraries that run a step."""
    return {"versions": library_versions(), "git_commit": git_commit()}


def remove(path: Path) -> None:
    """Delete a result (file or folder) if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def identity_of(paths: Sequence[Path]) -> list[Any]:
    """Identify the given files and folders by content alone; a pattern stands for the files that
    have such names. DataError names one that does not exist."""
    for path in paths:
        # a prepared prefix names two files, PREFIX.bin and PREFIX.idx
        if not (path.exists() or is_pattern(path) or token_paths(path)[0].exists()):
            raise DataError(
                f"{path} does not exist; correct the path in the configuration"
                + download_hint(path, what="dataset")
            )
    return [content_of(path) for path in paths]


def read_json(path: Path) -> Any:
    """Return the decoded JSON of a file of the run folder; DataError when it is damaged."""
    return json_text.read_json(_RESULT, path)
