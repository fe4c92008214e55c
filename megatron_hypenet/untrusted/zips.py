"""Find the members of a foreign zip file, without decompressing anything.

torch.save writes zip files whose members are stored as they are. A compressed member is refused, so
that no small file becomes a large one, and the table of members is read only while it is small.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, cast

from megatron_hypenet.untrusted.files import FileKind, reason_of, shown

MAX_TABLE_BYTES = 1 << 20
"""Largest accepted table of members: some 10,000 of them. One tensor has seven."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class StoredZip:
    """The zip file in bytes `start` to `start + length` of an open file: where each member's bytes
    lie."""

    def __init__(
        self, kind: FileKind, path: Path, stream: BinaryIO, start: int, length: int
    ) -> None:
        """Read the table of members; `kind`'s error when it is damaged, too large, or has a
        compressed member or a name twice."""
        self.kind = kind
        self.path = path
        self._window = _Window(stream, start, length)
        try:
            with zipfile.ZipFile(cast(BinaryIO, self._window)) as archive:
                members = archive.infolist()
            self._members: dict[str, tuple[int, int]] = {}
            for member in members:
                if member.filename in self._members:
                    raise zipfile.BadZipFile(f"the member {member.filename!r} is there twice")
                self._members[member.filename] = self._place(member)
        except (
            zipfile.BadZipFile,
            ValueError,
            OSError,
            NotImplementedError,
            struct.error,
            OverflowError,
        ) as error:
            kind.refuse(path, f"damaged at byte {start}: {shown(reason_of(error))}")

    def names(self) -> list[str]:
        """Return the names of the members, in the table's order."""
        return list(self._members)

    def place(self, name: str) -> tuple[int, int]:
        """Return (first byte in the whole file, number of bytes) of the member `name`; `kind`'s
        error when there is none."""
        if name not in self._members:
            self.kind.refuse(
                self.path, f"damaged at byte {self._window.start}: no member {shown(name)}"
            )
        return self._members[name]

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a small member; `kind`'s error when there is none, or when it is
        larger than `max_bytes`."""
        start, size = self.place(name)
        if size > max_bytes:
            self.kind.refuse(
                self.path,
                f"its member {shown(name)} has {size:,} bytes, the limit is {max_bytes:,}",
            )
        return self._window.bytes_at(start - self._window.start, size)

    def _place(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.compress_size != member.file_size
            or member.flag_bits & 1
        ):
            raise zipfile.BadZipFile(
                f"the member {shown(member.filename)} is compressed or encrypted; "
                "torch stores members as they are"
            )
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(
            self._window.bytes_at(member.header_offset, _LOCAL_HEADER.size)
        )
        first = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature != b"PK\x03\x04" or first + member.file_size > self._window.length:
            raise zipfile.BadZipFile(
                f"the member {shown(member.filename)} is not where the table says"
            )
        return self._window.start + first, member.file_size


class _Window:
    """Some bytes of a file as a file of its own. It refuses to read more at once than the table of
    members may have."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self.stream = stream
        self.start = start
        self.length = length
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[
            whence
        ] + offset
        if position < 0:
            raise OSError("a position before the first byte")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.length - self._position)
        found = self.bytes_at(self._position, rest if size < 0 else min(size, rest))
        self._position += len(found)
        return found

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` of the window; ValueError when they are not all there,
        or too many."""
        if size > MAX_TABLE_BYTES:
            raise ValueError(
                f"{size:,} bytes of member names and headers, the limit is {MAX_TABLE_BYTES:,}"
            )
        if offset < 0 or offset > self.length - size:
            raise ValueError("it ends too early")
        found = os.pread(self.stream.fileno(), size, self.start + offset)
        if len(found) != size:
            raise ValueError("it ends too early")
        return found
