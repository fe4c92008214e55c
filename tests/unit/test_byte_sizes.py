"""Sizes are shown in a unit that leaves digits to read."""

from megatron_hypenet.byte_sizes import size_text


def test_sizes():
    sizes = {
        0: "0 B",
        1023: "1023 B",
        1536: "1.5 KiB",
        50 << 20: "50.0 MiB",
        3 << 29: "1.5 GiB",
        3 << 40: "3,072.0 GiB",
    }
    assert {size: size_text(size) for size in sizes} == sizes
