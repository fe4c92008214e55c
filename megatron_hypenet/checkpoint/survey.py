"""Find every checkpoint in a folder with its state, without reading a tensor and without importing
torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import is_temporary
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import (
    FORMAT_VERSION,
    KIND,
    Manifest,
    file_problems,
    read_manifest,
)
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError, ConfigError
from megatron_hypenet.untrusted.json_text import read_object, typed

COMMITTED = "committed"
DAMAGED = "damaged"
UNCOMMITTED = "uncommitted"
UNFINISHED = "unfinished"
"""States: usable; committed, but files are missing or have changed size; never committed; the rest
of a save that was interrupted or is running."""

_DEPTH = 4
"""RUN/STAGE/checkpoints/iter_XXXXXXX is the deepest path of a checkpoint below the folder that
holds all runs."""

_AXES = {
    "world": "processes",
    "tensor": "tp",
    "pipeline": "pp",
    "virtual_pipeline": "vp",
    "context": "cp",
    "data": "dp",
    "zero_stage": "zero",
}


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """The entries of train_state.json that are shown, in any version of it."""

    stage: str = ""
    step: int = 0
    samples: int = 0
    tokens: int = 0
    losses: tuple[float, ...] = ()
    layout: dict[str, int] = field(default_factory=dict)


_PROGRESS = tuple(_Progress.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One checkpoint, or what is left of one. Counts are None where no readable file has them."""

    path: Path
    state: str
    """One of COMMITTED, DAMAGED, UNCOMMITTED, UNFINISHED."""
    problem: str | None
    """The reason why it is not usable."""
    bytes: int
    """Size of its files on the disk."""
    kind: str | None
    stage: str | None
    step: int | None
    tokens: int | None
    created: str | None
    """UTC time of the commit, ISO 8601."""
    layout: dict[str, Any] | None
    """Parallel layout of the run that wrote it; None for weights that one process wrote."""

    def as_dict(self) -> dict[str, Any]:
        """Return the checkpoint as plain data for JSON."""
        return {**asdict(self), "path": str(self.path)}


def survey(folder: Path) -> list[Found]:
    """Return every checkpoint in a folder of runs, a run folder, a stage folder, a folder of
    iter_XXXXXXX, or the checkpoint `folder` itself.

    Ordered by folder and step. CheckpointError when `folder` does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give a checkpoint, or a run or stage folder that holds some"
        )
    return [
        look_at(path)
        for path in sorted(
            _checkpoints(folder, _DEPTH), key=lambda path: (path.parent, path.name.lstrip("."))
        )
    ]


def _checkpoints(folder: Path, depth: int) -> Iterator[Path]:
    if _looks_like_one(folder):
        yield folder
    elif depth:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                yield from _checkpoints(entry, depth - 1)


def _looks_like_one(folder: Path) -> bool:
    name = fmt.iteration_of(folder) is not None or is_temporary(folder)
    return name or fmt.is_committed(folder) or (folder / fmt.WEIGHTS / "metadata.json").is_file()


def look_at(folder: Path) -> Found:
    """Return the state of one checkpoint folder, by presence and size of its files (hashes are for
    manifest.verify_files)."""
    state, problem, manifest = _state(folder)
    progress = read_progress(folder)
    step = manifest.step if manifest is not None else None
    return Found(
        path=folder,
        state=state,
        problem=problem,
        bytes=sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()),
        kind=manifest.kind if manifest is not None else None,
        stage=manifest.stage if manifest is not None else progress.get("stage"),
        step=step if step is not None else fmt.iteration_of(folder),
        tokens=progress.get("tokens"),
        created=manifest.created if manifest is not None else None,
        layout=progress.get("layout") or None,
    )


def _state(folder: Path) -> tuple[str, str | None, Manifest | None]:
    if is_temporary(folder):
        return (
            UNFINISHED,
            "left by a save that was interrupted, or one that is running; "
            "the run's next start clears it away",
            None,
        )
    if not fmt.is_committed(folder):
        return UNCOMMITTED, f"it has no {fmt.COMMITTED} marker", None
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return DAMAGED, str(error), None
    problems = file_problems(folder, manifest, hashes=False)
    return (DAMAGED, "; ".join(problems[:3]), manifest) if problems else (COMMITTED, None, manifest)


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the content of train_state.json, unchecked; empty when there is none or it cannot be
    read."""
    path = folder / fmt.TRAIN_STATE
    try:
        record = read_object(KIND, path)
        typed(
            KIND, path, {key: value for key, value in record.items() if key in _PROGRESS}, _Progress
        )
    except CheckpointError:
        return {}
    return record


def layout_text(layout: dict[str, Any] | None) -> str:
    """Return "4 processes, tp2 pp2 cp1 dp1 zero1", or "-" for None; keys that this version does not
    know are written out."""
    if not layout:
        return "-"
    axes = " ".join(
        f"{short}{layout[key]}" for key, short in _AXES.items() if key in layout and key != "world"
    )
    rest = [f"{key}={value}" for key, value in layout.items() if key not in _AXES]
    processes = (
        "1 process"
        if layout.get("world") == 1
        else f"{layout['world']} processes"
        if "world" in layout
        else ""
    )
    return ", ".join(part for part in (processes, axes, *rest) if part)


def describe(folder: Path) -> dict[str, Any]:
    """Return everything about one checkpoint but its tensors: `Found`, the manifest's origin,
    progress, and the model's shape as stored.

    Works on a damaged checkpoint as far as its files can be read.
    """
    found = look_at(folder)
    manifest = _state(folder)[2]
    described: dict[str, Any] = found.as_dict()
    described["progress"] = {
        key: value
        for key, value in read_progress(folder).items()
        if key not in ("losses", "layout")
    }
    losses = read_progress(folder).get("losses")
    described["progress"] |= {"last_loss": losses[-1]} if losses else {}
    if manifest is not None:
        described |= {
            "versions": manifest.versions,
            "git_commit": manifest.git_commit,
            "format_version": manifest.format_version,
        }
        described |= {
            "files": len(manifest.files),
            "notes": {key: value for key, value in manifest.extra.items() if key != "step"},
        }
    else:
        described |= {
            "versions": {},
            "git_commit": None,
            "format_version": FORMAT_VERSION,
            "files": None,
            "notes": {},
        }
    try:
        stored = read_object(KIND, folder / fmt.MODEL_JSON)
        ModelConfig.from_json(json.dumps(stored))
        described["model"] = stored
    except (CheckpointError, ConfigError):
        described["model"] = None
    described["tokenizer"] = (folder / fmt.TOKENIZER).is_dir()
    return described


def mixer_runs(mixer_types: list[str]) -> list[str]:
    """Return mixers by layer, adjacent equal ones joined: ["0-2 lightning_attn", "3 attn"]."""
    lines: list[str] = []
    start = 0
    for layer in range(1, len(mixer_types) + 1):
        if layer == len(mixer_types) or mixer_types[layer] != mixer_types[start]:
            span = str(start) if layer - 1 == start else f"{start}-{layer - 1}"
            lines.append(f"{span} {mixer_types[start]}")
            start = layer
    return lines
