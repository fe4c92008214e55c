"""What decides whether a run goes on and a task is done again: settings, compared by their dotted
keys, and the content of input files."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_hypenet.data.sources import find_files, is_pattern

MAY_CHANGE = (
    "output_dir",
    "teacher",
    "data.train",
    "data.heldout",
    "parallel.*",
    "device",
    "model.transformer_impl",
    "*.micro_batch_size",
    "*.log_interval",
    "*.save_interval",
    "*.eval_interval",
    "*.vocab_chunk_tokens",
    "*.batch_size",
    "*.cuda_graphs",
    "*.recompute",
    "checkpoint.*",
    "guard.*",
    "eval.gate.*",
    "on_event",
    "trackers.*",
)
"""Settings that may differ when a run continues: they change where and how fast the run computes,
when it is given up, or where its input lies, but not its results (up to rounding). Input files are
compared by content (`content_of`)."""

FORM = 2
"""The form of fingerprints that this version records: the entry `fingerprints` of a manifest. Older
ones are read by older_records.py."""

_SAMPLE_BYTES = 1 << 20


def difference(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return `key: stored -> present` for every setting that differs and is not in MAY_CHANGE, by
    dotted key."""
    old, new = flat_settings(stored), flat_settings(present)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and not _may_change(key)]
    return [f"{key}: {_shown(old, key)} there, {_shown(new, key)} now" for key in keys]


def removed(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return `key: stored` for every stored setting that decides a result and that `present`, which
    has every known setting, lacks."""
    old, new = settled(stored), flat_settings(present)
    return [f"{key}: {value!r}" for key, value in old.items() if key not in new]


def settled(settings: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings that decide a result, by dotted key: all but those in MAY_CHANGE and in
    `without`."""
    return {
        key: value
        for key, value in flat_settings(settings).items()
        if not _may_change(key) and key not in without
    }


def fingerprint_of(payload: Mapping[str, Any]) -> str:
    """Hash a JSON-able description of a step's inputs."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, default=str).encode()).hexdigest()[
        :24
    ]


def content_of(path: Path) -> list[list[Any]]:
    """Identify the content of an input by suffix, size and sampled hash, wherever it lies and
    however it is spelled; for a folder, each of its files by the name inside it.

    A prefix of prepared token files stands for PREFIX.bin, PREFIX.idx and PREFIX.mask, if there is
    one; a pattern for the files that have such names, in order. Empty where there is no
    such file.
    """
    if path.is_dir():
        return files_identity(path)
    if is_pattern(path):
        files = [file.path for file in find_files(path).files]
        return [[file.name, file.stat().st_size, _sampled_hash(file)] for file in files]
    pair = [path.with_name(path.name + suffix) for suffix in (".bin", ".idx", ".mask")]
    files = [path] if path.is_file() else [file for file in pair if file.is_file()]
    return [[file.suffix, file.stat().st_size, _sampled_hash(file)] for file in files]


def files_identity(path: Path) -> list[list[Any]]:
    """Identify a file, or the files of a folder, by content: name, size, hash of the first and last
    MiB. This is cheap for large weights."""
    files = (
        sorted(entry for entry in path.rglob("*") if entry.is_file())
        if path.is_dir()
        else [path]
        if path.is_file()
        else []
    )
    base = path if path.is_dir() else path.parent
    return [
        [file.relative_to(base).as_posix(), file.stat().st_size, _sampled_hash(file)]
        for file in files
    ]


def _sampled_hash(file: Path) -> str:
    status = file.stat()
    return _sampled_hash_of(
        file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


# cached, because a run asks for its teacher's before every task; a changed file has another state
@functools.cache
def _sampled_hash_of(file: Path, _inode: int, size: int, _modified: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def flat_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; tuples become lists, as they are stored."""
    if not isinstance(value, Mapping):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in flat_settings(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _may_change(key: str) -> bool:
    return any(fnmatch.fnmatch(key, rule) for rule in MAY_CHANGE)


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"
