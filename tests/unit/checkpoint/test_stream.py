"""Pieces are written by several threads; file, hash and errors do not depend on their number."""

import hashlib
import os
import time
import zlib

import pytest

from megatron_hypenet.checkpoint import stream
from megatron_hypenet.checkpoint.stream import FilePlan, Meter, Values, write_files
from megatron_hypenet.errors import SetupError

CONTENT = os.urandom(10_000)


def values(content, unit=7, **options):
    def fill(first, target):
        target[:] = content[first : first + len(target)]

    return Values(num_bytes=len(content), unit=unit, fill=fill, **options)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 100)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_sections_lie_behind_each_other(tmp_path, workers):
    checked = values(CONTENT, trailer=lambda crc: crc.to_bytes(4, "big"), trailer_bytes=4)
    sections = [b"head", b"er", checked, b"", values(CONTENT[:501]), b"end"]
    want = b"header" + CONTENT + zlib.crc32(CONTENT).to_bytes(4, "big") + CONTENT[:501] + b"end"
    plans = [FilePlan(tmp_path / "a", sections, hashed=True), FilePlan(tmp_path / "b", sections)]
    entry, none = write_files(plans, workers=workers)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == want
    assert (entry.bytes, entry.sha256) == (len(want), hashlib.sha256(want).hexdigest())
    assert none is None


def test_files_without_values(tmp_path):
    write_files([FilePlan(tmp_path / "a", []), FilePlan(tmp_path / "b", [b"x"])])
    assert (tmp_path / "a").read_bytes() == b"" and (tmp_path / "b").read_bytes() == b"x"


def test_a_unit_larger_than_a_piece_stays_whole(tmp_path):
    asked = []
    source = values(CONTENT, unit=3000)
    section = Values(
        num_bytes=10_000,
        unit=3000,
        fill=lambda first, target: (asked.append((first, len(target))), source.fill(first, target)),
    )
    write_files([FilePlan(tmp_path / "a", [section])], workers=1)
    assert asked == [(0, 3000), (3000, 3000), (6000, 3000), (9000, 1000)]
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_failure_in_order_is_raised(tmp_path, workers):
    def fill(first, target):
        if first >= 490:
            time.sleep(0.02 if first == 490 else 0)
            raise ValueError(first)

    section = Values(num_bytes=5000, unit=7, fill=fill)
    with pytest.raises(ValueError, match="^490$"):
        write_files([FilePlan(tmp_path / "a", [section])], workers=workers)


def test_no_space_is_known_before_anything_is_written(tmp_path):
    plan = FilePlan(tmp_path / "a", [Values(num_bytes=1 << 60, unit=1, fill=None)])
    with pytest.raises(SetupError, match="its disk has .* GB free; nothing was written"):
        write_files([plan])
    assert list(tmp_path.iterdir()) == []


def test_progress_says_rate_and_time_left(monkeypatch):
    lines = []
    meter = Meter(4_000_000_000, lines.append, "wrote")
    meter.started -= 10
    meter.add(1_000_000_000)
    assert lines == []
    meter.next = 0
    meter.add(1_000_000_000)
    assert lines == ["wrote 2.00 of 4.00 GB (50 %), 0.20 GB/s, 10 s left"]
