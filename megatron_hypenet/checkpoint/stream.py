"""Write large files in pieces: several threads produce and write them, and the file is hashed in
order on the way, in bounded memory.

A file is a list of sections in order: bytes that are known, values that a function produces from
any place on, and bytes that depend on the checksum of the values before them. Places are known
beforehand, so pieces are written wherever they are ready; what is hashed is what was written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hypenet.checkpoint.manifest import FileEntry
from megatron_hypenet.checkpoint.ordered_work import one_thread_per_operation, run_in_order
from megatron_hypenet.checkpoint.tensor_archive import combined_crc
from megatron_hypenet.errors import SetupError

PIECE_BYTES = 8 << 20
"""Largest piece, unless one unit of a section is larger."""
MAX_WORKERS = 4
"""Default limit of threads: reading and checking take about as long as hashing, which one thread
does."""
_FLUSH_BYTES = 256 << 20
_SAY_SECONDS = 5.0
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A section of a file whose bytes `fill` produces."""

    num_bytes: int
    unit: int
    """Pieces begin at multiples of this number of bytes."""
    fill: Callable[[int, memoryview], None]
    """Called with the first byte of a piece, and the place for its bytes; from several threads."""
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
    machine), and has reached the disk. Memory: PIECE_BYTES times 2 * workers + 2. `progress` gets
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
            f"cannot write {needed / 1e9:,.2f} GB into {folder.parent}: its disk has "
            f"{free / 1e9:,.2f} GB free; nothing was written. Free space or choose another folder"
        )


@dataclass(slots=True)
class _Piece:
    """Part of a section: its bytes in the section and in the file."""

    section: Values
    first: int
    num_bytes: int
    place: int


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


@dataclass(slots=True)
class _Flusher:
    """Brings a file to the disk while it is written, so that little is left at the end."""

    descriptor: int
    written: int = 0
    _busy: threading.Thread | None = field(default=None)

    def add(self, num_bytes: int) -> None:
        self.written += num_bytes
        if self.written >= _FLUSH_BYTES and (self._busy is None or not self._busy.is_alive()):
            self.written = 0
            self._busy = threading.Thread(target=self._flush, daemon=True)
            self._busy.start()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # the last fsync reports it
            os.fdatasync(self.descriptor)

    def end(self) -> None:
        if self._busy is not None:
            self._busy.join()


def _pieces(sections: Sequence[Section]) -> tuple[list[_Piece], list[tuple[int, int, bytes]]]:
    """Return (pieces in order, (number of pieces before it, place, content) of the known bytes)."""
    pieces: list[_Piece] = []
    known = []
    place = 0
    for section in sections:
        if isinstance(section, bytes):
            known.append((len(pieces), place, section))
            place += len(section)
            continue
        step = max(section.unit, PIECE_BYTES // section.unit * section.unit)
        for first in range(0, section.num_bytes, step):
            num_bytes = min(step, section.num_bytes - first)
            pieces.append(_Piece(section, first, num_bytes, place + first))
        place += section.num_bytes + section.trailer_bytes
    return pieces, known


class _FileWriter:
    """One file while it is written: pieces by several threads, everything else in order."""

    def __init__(self, plan: FilePlan, meter: Meter) -> None:
        self.plan = plan
        self.meter = meter
        self.pieces, known = _pieces(plan.sections)
        self.known = deque(known)
        self.digest = hashlib.sha256()
        # crc32 of the pieces of sections with a trailer, and of what was finished of a section
        self.crcs = [0] * len(self.pieces)
        self.crc = 0
        # the kernel lets one thread at a time write into a file, and the others spin meanwhile
        self.writing = threading.Lock()

    def write(self, workers: int) -> FileEntry | None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.descriptor = os.open(self.plan.path, flags, 0o666)
        self.flusher = _Flusher(self.descriptor)
        total = self.plan.num_bytes
        try:
            if total:
                _reserve(self.descriptor, total)
            largest = max((piece.num_bytes for piece in self.pieces), default=0)
            try:
                run_in_order(
                    len(self.pieces),
                    self.produce,
                    self.finish,
                    workers=workers,
                    buffer_bytes=largest,
                )
                self.put_known(len(self.pieces))
            finally:
                self.flusher.end()
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
        if not self.plan.hashed:
            return None
        return FileEntry(bytes=total, sha256=self.digest.hexdigest())

    def produce(self, index: int, buffer: memoryview) -> int:
        """Fill a buffer with a piece and write it to its place; in any order."""
        piece = self.pieces[index]
        target = buffer[: piece.num_bytes]
        piece.section.fill(piece.first, target)
        if piece.section.trailer is not None:
            self.crcs[index] = zlib.crc32(target)
        with self.writing:
            _write_at(self.descriptor, target, piece.place)
        return piece.num_bytes

    def finish(self, index: int, content: memoryview) -> None:
        """Hash a piece that was written, with the known bytes before it; in order."""
        self.put_known(index)
        piece = self.pieces[index]
        section = self.pieces[index].section
        if self.plan.hashed:
            self.digest.update(content)
        if section.trailer is not None:
            before = self.crc if piece.first else 0
            self.crc = combined_crc(before, self.crcs[index], piece.num_bytes)
            if piece.first + piece.num_bytes == section.num_bytes:
                self.put(piece.place + piece.num_bytes, section.trailer(self.crc))
        self.flusher.add(piece.num_bytes)
        self.meter.add(piece.num_bytes)

    def put_known(self, before: int) -> None:
        """Write the known bytes that lie before piece number `before`."""
        while self.known and self.known[0][0] <= before:
            _, place, content = self.known.popleft()
            self.put(place, content)

    def put(self, place: int, content: bytes) -> None:
        with self.writing:
            _write_at(self.descriptor, content, place)
        if self.plan.hashed:
            self.digest.update(content)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Take a file's space on the disk at once: a full disk is known before the work, and writing
    costs a fraction of what a growing file costs. Does nothing where the file system cannot."""
    # not os.posix_fallocate: where the file system cannot, it writes into every block
    failed = _fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))
    if failed and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write_at(descriptor: int, content: bytes | memoryview, place: int) -> None:
    view = memoryview(content)
    while view.nbytes:
        written = os.pwrite(descriptor, view, place)
        place += written
        view = view[written:]
