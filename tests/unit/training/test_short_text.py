"""Counts and times are short."""

from megatron_hypenet.training.short_text import short_count, short_time
from tests.processes import loaded_by


def test_short_forms():
    assert [short_count(value) for value in (12.3, 1234, 5.67e6, 8e9)] == [
        "12",
        "1.2k",
        "5.7M",
        "8.0G",
    ]
    assert [short_time(value) for value in (0.4, 59.4, 72, 3700)] == ["0s", "59s", "1m12s", "1h01m"]


def test_no_tensor_library_is_imported():
    assert loaded_by("import megatron_hypenet.training.short_text", ("torch",)) == []
