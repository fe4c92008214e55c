"""Write large files in pieces: several threads produce and write them, and the file is hashed in
order on the way, in bounded memory.

A file is a list of sections in order: bytes that are known, values that a function produces from
any place on, and bytes that depend on the checksum of the values before them. It is cut into pieces
of one size. Each is filled by any thread, then completed and hashed in order, then written by any
thread; what is hashed is what is written.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hypenet.byte_sizes import size_text
from megatron_hypenet.checkpoint.manifest import FileEntry
from megatron_hypenet.checkpoint.ordered_work import one_thread_per_operation, run_in_order
from megatron_hypenet.checkpoint.output_file import OutputFile
from megatron_hypenet.checkpoint.tensor_archive import combined_crc
from megatron_hypenet.errors import SetupError

PIECE_BYTES = 4 << 20
"""Size of a piece: a multiple of output_file.BLOCK_BYTES."""
MAX_WORKERS = 4
"""Default limit of threads: reading and checking take about as long as hashing, which one thread
does."""
_SAY_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A section of a file whose bytes `fill` produces."""

    num_bytes: int
    unit: int
    """`fill` is asked for multiples of this number of bytes, from multiples of it on."""
    fill: Callable[[int, memoryview], None]
    """Called with the first byte of a part, and the place for its bytes; from several threads."""
    trailer: Callable[[int], bytes] | None = None
    """The bytes behind the section, from the crc32 of its own."""
    trailer_bytes: int = 0


Section = bytes | Values


@dataclass(slots=True)
class FilePlan:
    """A file to write."""

    path: Path
    sections: Sequence[Section]
    hashed: bool = False
    """Whether its sha256 is wanted."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the whole file."""
        return sum(
            len(section)
            if isinstance(section, bytes)
            else section.num_bytes + section.trailer_bytes
            for section in self.sections
        )


def default_workers() -> int:
    """Return the number of threads that suits this machine: its usable cores, at most
    MAX_WORKERS."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def write_files(
    plans: Sequence[FilePlan],
    *,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[FileEntry | None]:
    """Write the files, one after the other, and return size and sha256 of those that are hashed.

    The content is the same for any number of `workers` (threads; None: as many as suit the
    machine), and has reached the disk. Memory: PIECE_BYTES times 2 * workers + 4. `progress` gets
    a line every few seconds. SetupError, before anything is written, when the disk has less space
    than all files take; else the first failure in the order of a file. Files that were begun are
    left to the caller."""
    require_space(plans)
    meter = Meter(sum(plan.num_bytes for plan in plans), progress, "wrote")
    with one_thread_per_operation():
        return [_FileWriter(plan, meter).write(workers or default_workers()) for plan in plans]


def require_space(plans: Sequence[FilePlan]) -> None:
    """Raise SetupError unless the disk has space for all of these files of one folder."""
    if not plans:
        return
    folder = plans[0].path.parent
    needed = sum(plan.num_bytes for plan in plans)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise SetupError(
            f"cannot write {size_text(needed)} into {folder.parent}: its disk has "
            f"{size_text(free)} free; nothing was written. Free space or choose another folder"
        )


class Meter:
    """Calls a function with a line of progress every few seconds: share, GB/s and time left."""

    def __init__(self, total: int, say: Callable[[str], None] | None, verb: str) -> None:
        """`total` is in bytes; `verb` says what happens to them, in the past tense."""
        self.total = total
        self.say = say
        self.verb = verb
        self.done = 0
        self.started = time.monotonic()
        self.next = self.started + _SAY_SECONDS

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done; from one thread at a time."""
        self.done += num_bytes
        now = time.monotonic()
        if self.say is None or now < self.next:
            return
        self.next = now + _SAY_SECONDS
        rate = self.done / (now - self.started)
        left = (self.total - self.done) / rate
        self.say(
            f"{self.verb} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB "
            f"({100 * self.done / max(1, self.total):.0f} %), {rate / 1e9:.2f} GB/s, "
            f"{left:.0f} s left"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Values of one section that lie in one piece."""

    section: Values
    first: int
    """First byte in the section."""
    num_bytes: int
    at: int
    """First byte in the piece."""


@dataclass(slots=True)
class _Piece:
    """A stretch of the file."""

    num_bytes: int
    parts: list[_Part] = field(default_factory=list)
    known: list[tuple[int, bytes]] = field(default_factory=list)
    """(first byte in the piece, content)."""
    crcs: list[int] = field(default_factory=list)
    """crc32 of each part of a section with a trailer, else 0."""


def _pieces(sections: Sequence[Section], total: int) -> list[_Piece]:
    """Cut a file of `total` bytes."""
    size = PIECE_BYTES
    pieces = [_Piece(min(size, total - start)) for start in range(0, total, size)]

    def stretches(place: int, num_bytes: int) -> Iterator[tuple[_Piece, int, int, int]]:
        """Yield (piece, first byte in it, first byte in the section, number of bytes)."""
        done = 0
        while done < num_bytes:
            number, at = divmod(place + done, size)
            count = min(size - at, num_bytes - done)
            yield pieces[number], at, done, count
            done += count

    place = 0
    for section in sections:
        if isinstance(section, bytes):
            for piece, at, first, count in stretches(place, len(section)):
                piece.known.append((at, section[first : first + count]))
            place += len(section)
        else:
            for piece, at, first, count in stretches(place, section.num_bytes):
                piece.parts.append(_Part(section, first, count, at))
            place += section.num_bytes + section.trailer_bytes
    return pieces


class _FileWriter:
    """One file while it is written."""

    def __init__(self, plan: FilePlan, meter: Meter) -> None:
        self.plan = plan
        self.meter = meter
        self.total = plan.num_bytes
        self.pieces = _pieces(plan.sections, self.total)
        self.digest = hashlib.sha256()
        self.crc = 0
        """crc32 of what was completed of a section."""
        self.trailer = b""
        """What is not in the file yet of the bytes behind the last section."""

    def write(self, workers: int) -> FileEntry | None:
        self.file = OutputFile(self.plan.path, self.total)
        try:
            run_in_order(
                len(self.pieces),
                self.produce,
                self.complete,
                afterwards=lambda index, content: self.file.write(content, index * PIECE_BYTES),
                workers=workers,
                buffer_bytes=min(PIECE_BYTES, self.total),
            )
        except BaseException:
            self.file.abandon()
            raise
        self.file.close()
        if not self.plan.hashed:
            return None
        return FileEntry(bytes=self.total, sha256=self.digest.hexdigest())

    def produce(self, index: int, buffer: memoryview) -> int:
        """Fill a piece but for what depends on checksums; in any order."""
        piece = self.pieces[index]
        for at, content in piece.known:
            buffer[at : at + len(content)] = content
        for part in piece.parts:
            target = buffer[part.at : part.at + part.num_bytes]
            _fill(part.section, part.first, target)
            piece.crcs.append(0 if part.section.trailer is None else zlib.crc32(target))
        return piece.num_bytes

    def complete(self, index: int, content: memoryview) -> None:
        """Add what depends on checksums, and hash the piece; in order."""
        piece = self.pieces[index]
        self.put_trailer(content, 0)
        for part, crc in zip(piece.parts, piece.crcs, strict=True):
            section = part.section
            if section.trailer is None:
                continue
            self.crc = combined_crc(self.crc if part.first else 0, crc, part.num_bytes)
            if part.first + part.num_bytes == section.num_bytes:
                self.trailer = section.trailer(self.crc)
                assert len(self.trailer) == section.trailer_bytes, "a trailer of another length"
                self.put_trailer(content, part.at + part.num_bytes)
        if self.plan.hashed:
            self.digest.update(content)
        self.meter.add(piece.num_bytes)

    def put_trailer(self, content: memoryview, at: int) -> None:
        """Put what fits of the trailer into a piece, from byte `at` on."""
        now = self.trailer[: content.nbytes - at]
        content[at : at + len(now)] = now
        self.trailer = self.trailer[len(now) :]


def _fill(section: Values, first: int, target: memoryview) -> None:
    """Let a section fill `target`; units that lie in part outside of it are filled elsewhere."""
    unit, last = section.unit, first + target.nbytes
    start = -(-first // unit) * unit
    stop = last if last == section.num_bytes else last // unit * unit
    for low, high in ((first, min(start, last)), (start, stop), (max(start, stop), last)):
        if low >= high:
            continue
        if (low, high) == (start, stop):
            section.fill(low, target[low - first : high - first])
            continue
        begin = low // unit * unit
        whole = memoryview(bytearray(min(unit, section.num_bytes - begin)))
        section.fill(begin, whole)
        target[low - first : high - first] = whole[low - begin : high - begin]
