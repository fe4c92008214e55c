"""Read bytes and text of a foreign file, within limits."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from megatron_hypenet.errors import HypenetError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MIB = 1 << 20
_BLOCK = 4096
"""Direct reads begin and end at multiples of this."""
_DIRECT_BYTES = 4 * MIB + 2 * _BLOCK
_IN_WORDS = {"missing": "missing", "extra_forbidden": "unknown key"}
"""pydantic's kinds of findings that need no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """One kind of file: the error that a bad one raises, what to do about it, and its limits."""

    error: type[HypenetError]
    """Class of every error about such a file; it decides the exit code."""
    advice: str
    """How to fix it, the last clause of every message: "fetch the folder again"."""
    max_bytes: int = 16 * MIB
    """Largest accepted size in bytes."""
    max_depth: int = 64
    """Deepest accepted nesting of lists and mappings."""
    max_values: int = 2_000_000
    """Largest accepted number of values: list items, and keys and values of mappings."""
    max_digits: int = 100
    """Longest accepted integer, in decimal digits. Python's own conversion takes quadratic time."""

    def refuse(self, path: Path | str, reason: object) -> NoReturn:
        """Raise this kind's error about `path`."""
        raise self.error(f"{shown(path)}: {reason}; {self.advice}") from None

    def read_bytes(self, path: Path) -> bytes:
        """Return the content of the regular file `path`; raise `error` for anything else and above
        `max_bytes`."""
        try:
            with self.open(path) as stream:
                content = stream.read(self.max_bytes + 1)
        except OSError as error:
            self.refuse(path, f"cannot be read: {reason_of(error)}")
        if len(content) > self.max_bytes:
            limit = f"{self.max_bytes / MIB:g} MiB"
            self.refuse(path, f"larger than {limit}, the limit for this kind of file")
        return content

    def open(self, path: Path) -> BinaryIO:
        """Open the regular file `path` of any size for reading; raise `error` for anything else."""
        try:
            # O_NONBLOCK: opening a named pipe without it waits for a writer
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            self.refuse(path, "no such file")
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
            self.refuse(path, f"cannot be read: {reason_of(error)}")
        try:
            stream = open(descriptor, "rb")  # noqa: SIM115 - handed to the caller
        except OSError as error:  # a folder; Python has closed the descriptor
            self.refuse(path, f"cannot be read: {reason_of(error)}")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            stream.close()
            self.refuse(path, "not a regular file")
        return stream

    def read_text(self, path: Path) -> str:
        """Return the content of `path` as UTF-8 text, with a leading byte order mark dropped; raise
        `error` for other bytes and for NUL."""
        return self.decode(path, self.read_bytes(path))

    def decode(self, path: Path | str, content: bytes) -> str:
        """Return `content`, which came from `path`, as text; see `read_text`."""
        try:
            text = content.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            self.refuse(
                path, f"not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x})"
            )
        if "\0" in text:
            self.refuse(
                path,
                f"holds a NUL character (at character {text.index(chr(0))}): "
                "it is damaged or no text",
            )
        return text


def read_at(descriptor: int, target: memoryview, place: int) -> int:
    """Fill `target` from byte `place` of an open file on, whatever its position is; return the
    number of bytes, which is smaller where the file ends."""
    done = 0
    while done < target.nbytes:
        found = os.preadv(descriptor, [target[done:]], place + done)
        if not found:
            break
        done += found
    return done


def read_large(descriptor: int, target: memoryview, place: int) -> int:
    """Do what `read_at` does for a part of a large file that is read once: what the page cache
    lacks comes from the disk directly (O_DIRECT), where the file system can do that, and leaves no
    pages there. Sets the flags of `descriptor`, so no other thread may use it meanwhile."""
    done = _cached(descriptor, target, place)
    while done < target.nbytes:
        found = _direct(descriptor, target[done:], place + done)
        if not found:
            break
        done += found
    if done < target.nbytes:
        done += read_at(descriptor, target[done:], place + done)
    return done


def _cached(descriptor: int, target: memoryview, place: int) -> int:
    """Read what the page cache holds of the bytes from `place` on, up to the first gap."""
    done = 0
    with contextlib.suppress(OSError):  # nothing is there, or this cannot be asked
        while done < target.nbytes:
            found = os.preadv(descriptor, [target[done:]], place + done, os.RWF_NOWAIT)
            if not found:
                break
            done += found
    return done


def _direct(descriptor: int, target: memoryview, place: int) -> int:
    """Read some of the bytes from `place` on past the page cache; 0 where that cannot be done, and
    at the end of the file."""
    buffer = _aligned.memory()
    skipped = place % _BLOCK
    wanted = min(len(buffer), -(-(skipped + target.nbytes) // _BLOCK) * _BLOCK)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        found = os.preadv(descriptor, [buffer[:wanted]], place - skipped) - skipped
    except OSError:  # not on this file system; other failures come again without it
        return 0
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    count = max(0, min(found, target.nbytes))
    target[:count] = buffer[skipped : skipped + count]
    return count


class _Aligned(threading.local):
    """Memory of each thread for direct reads, which need it aligned."""

    _memory: memoryview | None = None

    def memory(self) -> memoryview:
        if self._memory is None:
            self._memory = memoryview(mmap.mmap(-1, _DIRECT_BYTES))
        return self._memory


_aligned = _Aligned()


def has_entry(path: Path) -> bool:
    """Return whether anything has this name, also a folder, or a symbolic link that leads nowhere
    or in a circle: then an optional file is not absent, and reading it reports the problem."""
    return os.path.lexists(path)


def inside(folder: Path, name: object, kind: FileKind) -> Path:
    """Return the path of the file or folder `name`, relative to `folder`, that a foreign file
    refers to.

    Raise `kind`'s error when `name` is no relative path, or leads out of `folder` by itself or
    through a symbolic link.
    """
    if not isinstance(name, str) or not name or "\0" in name or not name.isprintable():
        kind.refuse(folder, f"refers to the file {name!r}, which is no file name")
    path = Path(name)
    if len(name) > 4000 or any(len(part.encode()) > 255 for part in path.parts):
        kind.refuse(folder, f"refers to the file {shown(name, 60)}, whose name is too long")
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        kind.refuse(folder, f"refers to {name!r}, which is not inside the folder")
    target = folder / path
    if not is_inside(folder, target):
        found = os.path.realpath(target)
        where = "in a circle" if os.path.islink(found) else f"out of the folder, to {shown(found)}"
        kind.refuse(target, f"a symbolic link that leads {where}")
    return target


def is_inside(folder: Path, path: Path) -> bool:
    """Return whether `path`, with all symbolic links followed, is `folder` or lies in it.

    The snapshot folders of Hugging Face's cache hold links to the blobs of the same model,
    ../../blobs/HASH, which count as inside.
    """
    try:
        found, home = path.resolve(), folder.resolve()
        return found.is_relative_to(home) or (
            home.parent.name == "snapshots" and found.parent == home.parent.parent / "blobs"
        )
    except (OSError, RuntimeError):  # a loop of symbolic links
        return False


def reason_of(error: BaseException) -> str:
    """Return the message of an exception in one line: an OSError's reason without its path, else
    its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def shown(value: object, limit: int = 200) -> str:
    """Return `value` as text for a message: one printable line of at most `limit` characters."""
    text = value if isinstance(value, str) else str(value)
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text[: limit + 1]
    )
    return text if len(text) <= limit else text[: limit - 3] + "..."


def findings(error: ValidationError, *, whole: str) -> list[str]:
    """Return pydantic's findings, each `place: what is wrong, got VALUE` in bounded length; `whole`
    is the place of a finding about all values together."""
    return [
        f"{shown('.'.join(map(str, item['loc'])), 80) or whole}: {_what(item)}"
        for item in error.errors(include_url=False, include_context=False)
    ]


def _what(item: ErrorDetails) -> str:
    if item["type"] in _IN_WORDS:
        return _IN_WORDS[item["type"]]
    if item["type"] == "value_error":  # a rule of ours, which has said it all
        return shown(item["msg"].removeprefix("Value error, "), 600)
    message = (item["msg"][:1].lower() + item["msg"][1:]).removeprefix("input ")
    value = item["input"]
    written = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return f"{shown(message, 600)}, got {shown(written, 60)}"
