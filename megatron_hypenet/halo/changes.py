"""What becomes of a run's results when its configuration or its input files change.

A step that has begun keeps its result while everything that decided it is the same. Settings that
only later steps use are free to change. What is cheap is done again without asking: checks,
assembly, export and report, and anything before the first training step. Where training would be
lost, the command ends with the list of steps that would be done again, and `--redo-from STEP` does
them. A training stage that is only made longer continues, if the learning rates of the steps that
it has done stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.config.loader import completed
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.errors import CheckpointError, ConfigError, DataError, UsageError
from megatron_hypenet.halo.fingerprints import difference
from megatron_hypenet.halo.older_records import up_to_date
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner
from megatron_hypenet.halo.tasks import from_init, halo_steps

COSTLY = (*STAGES, "select")
"""Steps whose results are not thrown away without asking."""

_FILES = {
    "teacher": "the files of teacher={run.teacher} are others",
    "data": "the files of data.train or data.heldout are others",
    "assemble": "selection/mixers.json was changed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The difference between a run's records and what is asked for now."""

    what: tuple[str, ...] = ()
    """Settings and files that differ, each with both values."""
    again: tuple[str, ...] = ()
    """Steps that have begun and have to be done again, in order."""
    longer: tuple[str, ...] = ()
    """Training stages that go on, as sentences about their length and learning rate."""

    @property
    def loses(self) -> bool:
        """Return whether training or scores would be done again."""
        return any(step in COSTLY for step in self.again)

    def lines(self) -> list[str]:
        """Return the change for the log; nothing where nothing differs."""
        if not (self.what or self.again):
            return []
        kept = "no finished step is done again" if not self.again else ""
        again = f"done again: {', '.join(self.again)}" if self.again else kept
        return [
            f"changed since the last start: {'; '.join(self.what) or 'nothing'}",
            *self.longer,
            again,
        ]


def changed(
    run: RunConfig,
    folder: RunFolder,
    redo_from: str | None = None,
    init: tuple[str, Path] | None = None,
) -> Change:
    """Compare `run` with what is in its folder, read only.

    `init` is a stage that begins from a checkpoint of elsewhere, and that checkpoint. Raises
    UsageError for a `redo_from` that is no step; ConfigError where training would be lost without
    it, or although it is given.
    """
    records = up_to_date(folder, run, init)
    runner = Runner(run, records, halo_steps(run, records))
    if init is not None:
        runner.steps[init[0]] = from_init(runner.steps[init[0]], init[1])
    if redo_from is not None and redo_from not in runner.steps:
        raise UsageError(
            f"--redo-from {redo_from}: no step has this name; use one of {', '.join(runner.steps)}"
        )
    stored = folder.stored_settings()
    if stored is None:
        return Change()
    found = _compared(runner, completed(stored))
    found = replace(
        found, what=(*difference(completed(stored), run.model_dump(mode="json")), *found.what)
    )
    order = list(runner.steps)
    if redo_from is None:
        if found.loses:
            raise ConfigError(_refusal(runner, found))
        return found
    wanted = _with_what_follows(runner, redo_from)
    if not _covers(wanted, found):
        raise ConfigError(f"--redo-from {redo_from} comes too late: {_refusal(runner, found)}")
    if records.content().get("redoing") == redo_from:
        return found  # it was begun by an earlier start, which this one continues
    begun = [name for name in wanted if _begun(runner, name)]
    again = tuple(name for name in order if name in (*found.again, *begun))
    longer = tuple(line for line in found.longer if line.split(":")[0] not in again)
    return replace(found, again=again, longer=longer)


def accept(
    run: RunConfig,
    folder: RunFolder,
    redo_from: str | None = None,
    init: tuple[str, Path] | None = None,
) -> Change:
    """Check as `changed` does, and forget the records of the steps that are done again, so that
    they begin anew; for the process that owns the folder. Results stay until their step begins.
    """
    found = changed(run, folder, redo_from, init)
    manifest = dict(up_to_date(folder, run, init).content())
    for kind in ("steps", "started"):
        if kind in manifest:
            manifest[kind] = {
                name: record for name, record in manifest[kind].items() if name not in found.again
            }
    if redo_from is not None and folder.stored_settings() is not None:
        manifest["redoing"] = redo_from
    if manifest != dict(folder.content()):
        folder.write(manifest)
    return found


def finish_redo(folder: RunFolder) -> None:
    """Note that the command which --redo-from was given to has ended well: given again, it redoes
    the steps again."""
    manifest = dict(folder.content())
    if manifest.pop("redoing", ""):
        folder.write(manifest)


def _compared(runner: Runner, stored: Mapping[str, Any]) -> Change:
    """Return the steps to be done again, and the stages that go on longer."""
    again: list[str] = []
    longer: list[str] = []
    files: list[str] = []
    for name, step in runner.steps.items():
        if any(earlier in again for earlier in _before(runner, name)):
            if _begun(runner, name):
                again.append(name)
            continue
        if not _begun(runner, name):
            continue
        try:
            basis = runner.basis(name)
            whole = runner.fingerprint(name)
        except (CheckpointError, DataError, OSError):
            continue  # an input is not there, which other checks name
        record = runner.folder.records().get(name)
        if record is not None and record.get("fingerprint") == whole:
            continue
        if runner.goes_on(name, basis):
            if step.length is not None and (sentence := _lengthened(runner, name, stored)):
                longer.append(sentence)
                # what follows it was made from the shorter stage
                again += [
                    later
                    for later in runner.steps
                    if name in _before(runner, later) and _begun(runner, later)
                ]
            continue
        again.append(name)
        if name in _FILES:
            files.append(_FILES[name].format(run=runner.run))
    order = list(runner.steps)
    return Change(
        what=tuple(files), again=tuple(sorted(set(again), key=order.index)), longer=tuple(longer)
    )


def _with_what_follows(runner: Runner, name: str) -> tuple[str, ...]:
    """Return step `name` and the steps whose results it decides, in order."""
    return tuple(one for one in runner.steps if name in (one, *_before(runner, one)))


def _covers(steps: tuple[str, ...], found: Change) -> bool:
    """Return whether all training and scores that would be done again are among `steps`."""
    return all(name in steps for name in found.again if name in COSTLY)


def _first_to_redo(runner: Runner, found: Change) -> str:
    """Return the step for --redo-from: the first of those to be done again that decides all of the
    costly ones among them, else the last before them that does. A check that comes first in order
    need not decide any."""
    candidates = (*found.again, *reversed(runner.steps))
    return next(name for name in candidates if _covers(_with_what_follows(runner, name), found))


def _before(runner: Runner, name: str) -> set[str]:
    """Return the steps that decide the result of step `name`, directly or not."""
    found: set[str] = set()
    for earlier in runner.deciding(runner.steps[name]):
        found |= {earlier, *_before(runner, earlier)}
    return found


def _begun(runner: Runner, name: str) -> bool:
    """Return whether step `name` has finished, or has left something that would be lost."""
    if name in runner.folder.records():
        return True
    step = runner.steps[name]
    left = (
        any(path.exists() for path in step.results)
        if step.length is None
        else bool(fmt.iteration_folders(step.results[0] / fmt.CHECKPOINTS))
    )
    return left and runner.folder.started(name) is not None


def _lengthened(runner: Runner, name: str, stored: Mapping[str, Any]) -> str:
    """Return what a longer stage does with its schedule; empty where it is not longer."""
    config = runner.run.stage(name)
    before = stored.get(name, {}).get("train_iters")
    if before is None or before >= config.train_iters:
        return ""
    return f"{name}: goes on from its last checkpoint to step {config.train_iters}; " + (
        f"the learning rate stays at {config.lr:g}"
        if config.decay_iters is None
        else f"the cosine ends at step {config.decay_iters}, as before, and the learning rate "
        f"then stays at {config.min_lr:g}"
    )


def _refusal(runner: Runner, found: Change) -> str:
    listed = "".join(f"\n  - {line}" for line in found.what)
    advice = "".join(f"\n{line}" for line in found.longer) + _schedule_advice(found)
    return (
        f"{runner.folder.root} holds results of other settings or files:{listed}{advice}\n"
        f"{', '.join(found.again)} would be done again: "
        f"--redo-from {_first_to_redo(runner, found)}\n"
        "What comes before stays. Or restore the settings to keep everything, use another "
        "output_dir, or --overwrite to delete the run and start again."
    )


def _schedule_advice(found: Change) -> str:
    """Say how to lengthen a stage whose cosine ends with its last step; empty for any other
    change."""
    lines = []
    for stage in STAGES:
        start = f"{stage}.train_iters: "
        change = next((line for line in found.what if line.startswith(start)), "")
        if change and stage in found.again:
            before = change.removeprefix(start).split(" ")[0]
            lines.append(
                f"\n{stage}.lr_decay_iters={before} keeps the learning rates of the steps that are "
                "done, and the stage goes on from its last checkpoint at min_lr"
            )
    return "".join(lines)
