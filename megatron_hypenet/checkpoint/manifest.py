"""manifest.json: what a checkpoint is, where it came from, and the size and sha256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.errors import CheckpointError

FORMAT_VERSION = 1
_LIBRARIES = ("megatron-hypenet", "torch", "megatron-core", "deepspeed", "transformers")
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    kind: str
    """What the folder holds: teacher, student, align, distill, finetune, ..."""
    stage: str | None = None
    """HALO stage that wrote it, None for converted or assembled weights."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Relative path -> size and hash; everything but manifest.json and COMMITTED."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions of the writer."""
    git_commit: str | None = None
    """Commit of the writer's source tree, with "-dirty" when it had changes; None outside a work tree."""
    created: str = ""
    """UTC time, ISO 8601."""
    hf_config: dict[str, Any] | None = None
    """config.json of the Hugging Face folder the weights came from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the writer recorded."""
    format_version: int = FORMAT_VERSION
    """Version of the folder layout."""


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a checkpoint, as installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the source tree this package runs from; None when it is not a git work tree or git is missing."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of one file, read once."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


class HashedFile:
    """A new file that knows its size and sha256 when it is closed, without being read again: large pieces are hashed by a second thread
    while they are written. A context manager; `entry` holds after it, and what was written is on the disk then."""

    entry: FileEntry

    def __init__(self, path: Path) -> None:
        self._stream, self._digest, self._size = path.open("wb"), hashlib.sha256(), 0
        self._hashing = ThreadPoolExecutor(1)

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`, which may change once this has returned; the number of bytes."""
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
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
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
    folder: Path, *, kind: str, stage: str | None = None, extra: dict[str, Any] | None = None, known: dict[str, FileEntry] | None = None
) -> Manifest:
    """Hash every file of `folder` (except those in `known`, hashed by the rank that wrote them) and write manifest.json."""
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
    record["files"] = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in files.items()}
    (folder / fmt.MANIFEST).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return manifest


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of one committed folder; CheckpointError if the folder is uncommitted or its manifest unreadable."""
    folder = Path(folder)
    if not fmt.is_committed(folder):
        raise CheckpointError(
            f"{folder} has no {fmt.COMMITTED} marker: it is not a checkpoint, or its save never finished; use another one"
        )
    try:
        record = json.loads((folder / fmt.MANIFEST).read_text())
        record["files"] = {name: FileEntry(**entry) for name, entry in record["files"].items()}
        manifest = Manifest(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / fmt.MANIFEST} is unreadable: {error}; the checkpoint is damaged, use another one") from error
    if manifest.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.format_version}, this version reads up to {FORMAT_VERSION}; update megatron-hypenet"
        )
    return manifest


def file_problems(folder: Path, manifest: Manifest, *, hashes: bool) -> list[str]:
    """What is wrong with the files named in the manifest, one line each, empty when all is well."""
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes, manifest says {entry.bytes}")
        elif hashes and hash_file(path).sha256 != entry.sha256:
            problems.append(f"{name}: sha256 differs from the manifest")
    return problems


def verify_files(folder: Path | str, *, hashes: bool = False) -> Manifest:
    """Check presence and size of every file, and with `hashes` its content; CheckpointError names the first few and counts the rest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = file_problems(folder, manifest, hashes=hashes)
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(
            f"{folder} is damaged: {len(problems)} of {len(manifest.files)} files ({shown}); restore them or use an older checkpoint"
        )
    return manifest
