"""Write files that appear complete or not at all, under temporary names that contain the writer's
process number.

A file or folder is made under a temporary name beside its target, brought to the disk, and renamed.
The next owner of the target recognises by the name what a killed process left, and removes it
(`sweep`; see ownership.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# .NAME.tmp-4711, .NAME.old-4711, .NAME.del-4711, .NAME.tmp-4711.bin; .NAME.partial4711.bin was
# written by version 0.1
_TEMPORARY = re.compile(
    r"\.(?P<target>.+)\.(?:(?P<kind>tmp|old|del)-|partial)(?P<pid>\d+)(?P<suffix>\.\w+)?"
)


def temporary_beside(target: Path, *, kind: str = "tmp", pid: int | None = None) -> Path:
    """Return the name under which this process, or process `pid`, makes `target`, with kind "old"
    keeps what it is about to replace, and with kind "del" deletes a folder: a name that `sweep`
    never gives back."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid() if pid is None else pid}")


def is_temporary(path: Path) -> bool:
    """Return whether this is the name of an unfinished file or folder, or of one that was being
    replaced."""
    return _TEMPORARY.fullmatch(path.name) is not None


def target_of(path: Path) -> Path | None:
    """Return what the temporary `path` was to become, or was; None when its name is none of
    ours."""
    match = _TEMPORARY.fullmatch(path.name)
    return None if match is None else path.with_name(match["target"])


def was_replaced(path: Path) -> bool:
    """Return whether the temporary `path` holds what was being replaced, not what was being
    made."""
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and match["kind"] == "old"


def is_being_deleted(path: Path) -> bool:
    """Return whether the temporary `path` holds the rest of something that was being deleted."""
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and match["kind"] == "del"


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary name to write the file `path` under; it takes the name `path` when the
    block ends, and is removed on an error.

    Readers see the old file or the whole new one. If `durable`, the new one has reached the disk
    before it takes the name.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        # an error of the block says more than that there is nothing to remove
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small UTF-8 text file as `replacing` does; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, payload: Any) -> None:
    """Write indented JSON as `write_text` does; ValueError for NaN and infinity, which JSON does
    not have."""
    write_text(path, json.dumps(payload, indent=2, allow_nan=False) + "\n")


def sweep(folder: Path, *, names: Collection[str] | None = None) -> list[Path]:
    """Remove what killed processes left below `folder`, or directly in it for the targets `names`,
    and return it.

    Only for the one process that owns the folder, or the targets: no other process then uses the
    files with temporary names. A folder in which people may keep files of their own is swept by
    `names`. What was being replaced gets its name back if nothing has taken its place. Symbolic
    links are not followed.
    """
    if folder.is_symlink():
        return []
    swept = []
    for root, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = Path(root) / entry
            match = _TEMPORARY.fullmatch(entry)
            if match is not None and (names is None or match["target"] in names):
                swept.append(path)
        folders[:] = (
            []
            if names is not None
            else [entry for entry in folders if _TEMPORARY.fullmatch(entry) is None]
        )
    for path in swept:
        target = target_of(path)
        if (
            was_replaced(path)
            and target is not None
            and not (target.exists() or target.is_symlink())
        ):
            os.replace(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return swept


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder in the system's place for temporary files, removed with the block; folders
    that killed processes left are removed first."""
    place = Path(tempfile.gettempdir())
    numbers = _process_numbers()
    for left in place.glob(f"hypenet-{numbers}-*"):
        pid = left.name.split("-")[2]
        with contextlib.suppress(OSError):
            if (
                pid.isdecimal()
                and not Path(f"/proc/{pid}").exists()
                and left.stat(follow_symlinks=False).st_uid == os.getuid()
            ):
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"hypenet-{numbers}-{os.getpid()}-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _process_numbers() -> str:
    """Name the space that process numbers belong to: containers that share a folder for temporary
    files have one each."""
    try:
        return re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return "x"
