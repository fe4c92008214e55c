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


@pytest.mark.parametrize(
    ("unit", "want"),
    [
        (3000, [(0, 3000), (3000, 3000), (6000, 3000), (9000, 1000)]),
        (40, [(first, 40) for first in range(0, 10_000, 40)]),
    ],
)
def test_values_are_asked_for_in_units(tmp_path, unit, want):
    asked = []
    source = values(CONTENT, unit=unit)

    def fill(first, target):
        asked.extend((at, min(unit, 10_000 - at)) for at in range(first, first + len(target), unit))
        assert first % unit == 0 and (len(target) % unit == 0 or first + len(target) == 10_000)
        source.fill(first, target)

    section = Values(num_bytes=10_000, unit=unit, fill=fill)
    write_files([FilePlan(tmp_path / "a", [b"x" * 17, section])], workers=1)
    assert sorted(set(asked)) == want
    assert (tmp_path / "a").read_bytes() == b"x" * 17 + CONTENT


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_failure_in_order_is_raised(tmp_path, workers):
    def fill(first, target):
        if first >= 500:
            time.sleep(0.02 if first == 500 else 0)
            raise ValueError(first)

    section = Values(num_bytes=5000, unit=10, fill=fill)
    with pytest.raises(ValueError, match="^500$"):
        write_files([FilePlan(tmp_path / "a", [section])], workers=workers)


def test_no_space_is_known_before_anything_is_written(tmp_path):
    plan = FilePlan(tmp_path / "a", [Values(num_bytes=1 << 60, unit=1, fill=None)])
    with pytest.raises(SetupError, match="its disk has .* free; nothing was written"):
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
