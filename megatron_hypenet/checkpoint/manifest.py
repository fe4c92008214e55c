"""Read and write manifest.json: the kind and origin of a checkpoint, and the size and sha256 of
each of its files.

One file, because what is written and what is checked of a manifest has to be read together."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import (
    FileKind,
    inside,
    read_at,
    read_large,
    reason_of,
    shown,
)
from megatron_hypenet.untrusted.json_text import parse_json, typed

logger = logging.getLogger(__name__)

KIND = FileKind(
    error=CheckpointError, advice="the checkpoint is damaged, use another one", max_bytes=64 << 20
)
"""Limits and error class for reading the small files of a checkpoint."""

WEIGHTS_PARTS = (fmt.WEIGHTS, fmt.MODEL_JSON)
"""Parts of a checkpoint that a reader of the weights needs."""

TEACHER_LICENSE = "teacher_license"
"""Entry of `Manifest.extra`: the licence that the teacher's Hugging Face folder states."""

FORMAT_VERSION = 1
_READ_FILES = (fmt.MODEL_JSON, fmt.TRAIN_STATE, fmt.RNG, fmt.CONFIG)
_HASH_IN = "manifest_hash_in"
"""Entry of `extra` in the file: names the file that holds the manifest's hash. Version 0.1 has no
such entry, and refuses one outside `extra`."""
_SHARDED_FOLDERS = (fmt.WEIGHTS, fmt.OPTIMIZER)
_SHARDED_FILES = (".metadata", "metadata.json", "common.pt")
"""Files of a sharded folder that are read besides those with tensors."""
_HASHING_THREADS = min(8, os.cpu_count() or 1)
_hashed: dict[tuple[int, ...], FileEntry] = {}
"""Hashes of files by device, inode, size and times."""
_LIBRARIES = ("megatron-hypenet", "torch", "megatron-core", "deepspeed", "transformers")
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of a checkpoint."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=0, le=1 << 62)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: str
    """Content of the folder: teacher, student, align, distill, finetune, ..."""
    stage: str | None = None
    """HALO stage that wrote it, None for converted or assembled weights."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Relative path -> size and hash of every file but manifest.json and COMMITTED."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions of the writer."""
    git_commit: str | None = None
    """Commit of the writer's source tree, with "-dirty" when it had changes; None outside a work
    tree."""
    created: str = ""
    """UTC time, ISO 8601."""
    hf_config: dict[str, Any] | None = None
    """config.json of the Hugging Face folder the weights came from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other entries that the writer recorded."""
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    """Version of the folder layout; checkpoint/format.py has its rule."""

    @property
    def step(self) -> int | None:
        """Return the number of finished optimizer steps of a training save, as its writer noted
        them."""
        step = self.extra.get("step")
        return step if type(step) is int else None


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that shape a checkpoint, as installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Return the commit of the source tree this package runs from; None when it is not a git work
    tree or git is missing."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hash_file(path: Path, *, past_cache: bool = False) -> FileEntry:
    """Return size and sha256 of one file, read once; of a large one the next block is read
    meanwhile. `past_cache`: blocks that the page cache lacks are not put there."""
    read = read_large if past_cache else read_at
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream, ThreadPoolExecutor(1) as reader:
        length = min(os.fstat(stream.fileno()).st_size + 1, _CHUNK_BYTES)
        blocks = [memoryview(bytearray(length)) for _ in range(2)]
        found = read(stream.fileno(), blocks[0], 0)
        while found:
            size += found
            block, blocks = blocks[0][:found], blocks[::-1]
            if found < length:
                digest.update(block)
                break
            following = reader.submit(read, stream.fileno(), blocks[0], size)
            digest.update(block)
            found = following.result()
    return FileEntry(bytes=size, sha256=digest.hexdigest())


class HashedFile:
    """Write a new file whose size and sha256 are known when it is closed, without reading it again:
    large pieces are hashed by a second thread while they are written. It is a context manager;
    after it `entry` is set and the content is on the disk."""

    entry: FileEntry

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0
        self._hashing = ThreadPoolExecutor(1)

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`, which may be changed once this has returned; returns the number of
        bytes."""
        with memoryview(data).cast("B") as view:
            if view.nbytes < _CHUNK_BYTES:
                self._digest.update(view)
                self._stream.write(view)
            else:
                hashed = self._hashing.submit(self._digest.update, view)
                try:
                    self._stream.write(view)
                finally:
                    hashed.result()
            self._size += view.nbytes
            return view.nbytes

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Pass buffered data to the operating system."""
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hashing.shutdown()
        with self._stream:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self.entry = FileEntry(bytes=self._size, sha256=self._digest.hexdigest())


def write_manifest(
    folder: Path,
    *,
    kind: str,
    stage: str | None = None,
    extra: dict[str, Any] | None = None,
    known: dict[str, FileEntry] | None = None,
) -> Manifest:
    """Hash every file of `folder` (except those in `known`, hashed by the rank that wrote them) and
    write manifest.json."""
    rest = dict(extra or {})
    known = known or {}
    files = {}
    for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in (fmt.MANIFEST, fmt.COMMITTED):
            files[name] = known.get(name) or hash_file(path)
    manifest = Manifest(
        kind=kind,
        stage=stage or rest.pop("stage", None),
        files=files,
        versions=library_versions(),
        git_commit=git_commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hf_config=rest.pop("hf_config", None),
        extra=rest,
    )
    record = {name: getattr(manifest, name) for name in Manifest.__slots__}
    record["files"] = {
        name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in files.items()
    }
    record["extra"] = rest | {_HASH_IN: fmt.COMMITTED}
    (folder / fmt.MANIFEST).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return manifest


def read_manifest(folder: Path | str) -> Manifest:
    """Return the manifest of one committed folder; CheckpointError if the folder is uncommitted, or
    its manifest unreadable or changed.

    COMMITTED holds the manifest's hash, and the manifest says so. In a folder of version 0.1 it is
    empty, and the manifest does not; then the manifest cannot be checked, and the log says so once.
    """
    folder = Path(folder)
    if not fmt.is_committed(folder):
        raise CheckpointError(
            f"{folder} has no {fmt.COMMITTED} marker: it is not a checkpoint, "
            "or its save never finished; use another one"
        )
    path = folder / fmt.MANIFEST
    content = KIND.read_bytes(path)
    marker = KIND.read_text(folder / fmt.COMMITTED).strip()
    if marker and marker != hashlib.sha256(content).hexdigest():
        KIND.refuse(path, f"differs from what {fmt.COMMITTED} says was written")
    record = parse_json(KIND, path, KIND.decode(path, content))
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}; "
            "update megatron-hypenet"
        )
    manifest = typed(KIND, path, record, Manifest)
    if manifest.extra.pop(_HASH_IN, None) and not marker:
        KIND.refuse(
            folder / fmt.COMMITTED, f"is empty; it was written with the hash of {fmt.MANIFEST}"
        )
    for name in manifest.files:
        inside(folder, name, KIND)
    if not marker:
        older = f"an older version, which kept no hash of {fmt.MANIFEST}"
        _say_once(f"{folder} was written by {older}: its files are checked, that list is not")
    return manifest


@functools.cache
def _say_once(text: str) -> None:
    # the other processes of a run find the same and need not log it
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)


def read_listed(folder: Path, name: str) -> bytes:
    """Return the content of a small file of a committed folder, verified against the manifest.
    Raises CheckpointError when it differs."""
    entry = read_manifest(folder).files.get(name)
    path = folder / name
    content = KIND.read_bytes(path)
    if entry is None:
        KIND.refuse(path, f"{fmt.MANIFEST} does not list it")
    if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        KIND.refuse(path, f"differs from what {fmt.MANIFEST} says was written")
    return content


def file_problems(
    folder: Path, manifest: Manifest, *, hashes: bool, parts: Collection[str] = ()
) -> list[str]:
    """Return the problems of a checkpoint's files, one line each; empty when there are none.

    Presence and size are checked, with `hashes` also the content, and that the manifest lists every
    file that would be read; other files that it does not list are ignored, and the log names them
    once. `parts` limits the check to some files and folders of the checkpoint, such as
    WEIGHTS_PARTS. A file that was hashed by this process and has not changed since is not read
    again.
    """
    listed = {name: entry for name, entry in manifest.files.items() if is_part(name, parts)}
    unlisted = [name for name in _present(folder) if name not in manifest.files]
    problems = [
        f"{name}: {fmt.MANIFEST} does not list it"
        for name in unlisted
        if _is_read(name) and is_part(name, parts)
    ]
    if foreign := [shown(name, 80) for name in unlisted if not _is_read(name)]:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        _say_once(
            f"{folder} also holds {', '.join(foreign[:3])}{more}, which {fmt.MANIFEST} does not "
            "list: not read"
        )
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes, manifest says {entry.bytes}")
    if hashes and not problems:
        problems = hash_problems(folder, replace(manifest, files=listed))
    return problems


def hash_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return the files whose content differs from the manifest, one line each; several files are
    hashed at a time."""
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        right = pool.map(
            lambda item: is_as_written(folder / item[0], item[1]), manifest.files.items()
        )
        return [
            f"{name}: sha256 differs from the manifest"
            for name, same in zip(manifest.files, right, strict=True)
            if not same
        ]


def is_part(name: str, parts: Collection[str]) -> bool:
    """Return whether a file of a checkpoint is one of `parts`, or lies in one of them; with no
    parts every file does."""
    return not parts or name in parts or name.partition("/")[0] in parts


def is_as_written(path: Path, entry: FileEntry, *, past_cache: bool = False) -> bool:
    """Return whether a file has the size and hash of `entry`; its hash is remembered as long as the
    file does not change. `past_cache` as for `hash_file`."""
    try:
        key = _state_of(path)
        if key not in _hashed:
            found = hash_file(path, past_cache=True) if past_cache else hash_file(path)
            if _state_of(path) != key:
                return False  # it was changed meanwhile
            _hashed[key] = found
    except OSError as error:
        KIND.refuse(path, f"cannot be read: {reason_of(error)}")
    return _hashed[key] == entry


def remember(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Record that another process of this command has verified these files: they are not hashed
    here again."""
    for name in names:
        with contextlib.suppress(OSError):
            _hashed[_state_of(folder / name)] = manifest.files[name]


def _state_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _present(folder: Path) -> list[str]:
    """Return the files of a checkpoint that its manifest has to list: those in the folder itself,
    and those in its subfolders."""
    found = [
        path
        for path in folder.iterdir()
        if not path.is_dir() and path.name not in (fmt.MANIFEST, fmt.COMMITTED)
    ]
    for part in (*_SHARDED_FOLDERS, fmt.TOKENIZER):
        found += [path for path in (folder / part).rglob("*") if not path.is_dir()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _is_read(name: str) -> bool:
    """Return whether a reader of a checkpoint would open the file `name` if it existed: all
    tokenizer files, and those with a fixed name."""
    part, _, rest = name.partition("/")
    if part in _SHARDED_FOLDERS:
        return rest in _SHARDED_FILES or rest.endswith(fmt.TENSORS_SUFFIX)
    return part == fmt.TOKENIZER or name in _READ_FILES


def verify_files(
    folder: Path | str, *, hashes: bool = False, parts: Collection[str] = ()
) -> Manifest:
    """Check the files of a checkpoint as `file_problems` does; CheckpointError names the first few
    and counts the rest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    refuse_damaged(folder, file_problems(folder, manifest, hashes=hashes, parts=parts))
    return manifest


def refuse_damaged(folder: Path, problems: Sequence[str]) -> None:
    """Raise CheckpointError with the first few of the problems, if there are any."""
    if problems:
        listed = "; ".join(problems[:3]) + (
            f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        )
        raise CheckpointError(
            f"{folder} is damaged: {len(problems)} of its files ({listed}); restore them, "
            "or delete the folder: a run then continues from "
            "an older save, or makes it again"
        )
