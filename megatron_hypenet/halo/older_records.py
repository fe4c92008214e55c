"""Records of steps in run folders that an older version wrote, read as records of this one.

Until the manifest had the entry `fingerprints`, a step's fingerprint held the names and spelling of
input files and the limits of `guard`, and had no part that a longer stage shares with a shorter
one. Here such a fingerprint is computed as it was then, from the configuration in the folder; where
it is the recorded one, the present form takes its place. A record that does not fit stays, and its
step counts as one with other inputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.config.loader import completed
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.errors import CheckpointError, DataError
from megatron_hypenet.halo.fingerprints import (
    FORM,
    MAY_CHANGE,
    files_identity,
    fingerprint_of,
    flat_settings,
)
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner
from megatron_hypenet.halo.tasks import from_init, halo_steps

_MIGHT_CHANGE = (
    *(
        rule
        for rule in MAY_CHANGE
        if rule not in ("teacher", "data.train", "data.heldout", "guard.*")
    ),
    "guard.max_skipped_steps",
    "guard.hang_timeout_seconds",
    # which came later; `added` leaves out what may change
    "guard.max_fp8_kl",
)
_SETTINGS = {"data": ("data",), "probe": ("guard", "precision")}
"""Sections that shaped a step then, where these were others than now."""


def up_to_date(
    folder: RunFolder, present: RunConfig, init: tuple[str, Path] | None = None
) -> RunFolder:
    """Read `folder` with its records in the present form; nothing is written.

    `present` has the files that are read where the stored configuration names files that are no
    longer there. `init` is a stage that begins from a checkpoint of elsewhere, and that checkpoint.
    """
    manifest = dict(folder.content())
    if not _has_records(manifest):
        return folder
    if manifest.get("fingerprints") != FORM and (then := _stored(folder)) is not None:
        runner = _runner_of(then, present, folder)
        inputs = {
            "teacher": [(then.teacher, runner.run.teacher)],
            "data": [*zip(_texts(then), _texts(runner.run), strict=True)],
            "assemble": [(folder.mixers_file, folder.mixers_file)],
        }
        manifest = _renewed(manifest, runner, then, inputs)
    if init is not None:
        name, start = init
        runner = Runner(present, folder, halo_steps(present, folder))
        runner.steps[name] = from_init(runner.steps[name], start)
        inputs = {
            "teacher": [(present.teacher, present.teacher)],
            "data": [(path, path) for path in _texts(present)],
            name: [(start / fmt.MANIFEST, start / fmt.MANIFEST)],
        }
        manifest = _renewed(manifest, runner, present, inputs, only=(name,))
    return replace(folder, manifest=manifest)


def _stored(folder: RunFolder) -> RunConfig | None:
    """Return the stored configuration; None where there is none that this version can read."""
    stored = folder.stored_settings()
    try:
        return None if stored is None else RunConfig.model_validate(completed(stored))
    except ValidationError:
        return None


def _has_records(manifest: Mapping[str, Any]) -> bool:
    return bool(manifest.get("steps") or manifest.get("started"))


def _texts(run: RunConfig) -> list[Path]:
    return [source.path for source in run.data.every_source]


def _runner_of(then: RunConfig, present: RunConfig, folder: RunFolder) -> Runner:
    """Return the steps of the stored configuration, with the files of `present` for those that are
    gone."""
    paths = [then.teacher, *_texts(then)]
    alike = len(_texts(then)) == len(_texts(present)) and (
        (then.data.heldout is None) == (present.data.heldout is None)
    )
    if not all(map(_exists, paths)) and alike:
        files = {"train": present.data.train, "heldout": present.data.heldout}
        data = then.data.model_copy(update=files)
        then = then.model_copy(update={"teacher": present.teacher, "data": data})
    return Runner(then, folder, halo_steps(then, folder))


def _exists(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".bin").exists()


def _renewed(
    manifest: dict[str, Any],
    runner: Runner,
    then: RunConfig,
    inputs: Mapping[str, Sequence[tuple[Path, Path]]],
    only: Sequence[str] = (),
) -> dict[str, Any]:
    steps = {name: dict(record) for name, record in manifest.get("steps", {}).items()}
    started = dict(manifest.get("started", {}))
    settings = then.model_dump(mode="json")
    found: dict[str, str] = {}
    for name, step in runner.steps.items():
        try:
            found[name] = fingerprint_of(
                {
                    "step": name,
                    "settings": _settled(
                        {key: settings[key] for key in _SETTINGS.get(name, step.settings)},
                        runner.added,
                    ),
                    "inputs": [_identity(*pair) for pair in inputs[name]]
                    if name in inputs
                    else None,
                    "after": [found[earlier] for earlier in step.after],
                }
            )
            if only and name not in only:
                continue
            if name in steps and steps[name].get("fingerprint") == found[name]:
                steps[name]["fingerprint"] = runner.fingerprint(name)
            if started.get(name) == found[name]:
                started[name] = runner.basis(name)
        except (KeyError, CheckpointError, DataError, OSError):
            continue  # an input that is not there: what comes after it has not begun, or is lost
    return {**manifest, "fingerprints": FORM, "steps": steps, "started": started}


def _settled(settings: Mapping[str, Any], added: frozenset[str]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat_settings(settings).items()
        if key not in added and not any(fnmatch.fnmatch(key, rule) for rule in _MIGHT_CHANGE)
    }


def _identity(then: Path, now: Path) -> list[list[Any]]:
    """Return the files at `now` under the names that `then` gives them."""
    if now.is_dir():
        return files_identity(now)
    suffix = "" if now.is_file() else ".bin"
    rows = files_identity(now.with_name(now.name + suffix))
    if not rows:
        raise DataError(f"{now} does not exist")
    return [[then.name + suffix, *row[1:]] for row in rows]
