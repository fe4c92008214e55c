"""Numbers of bytes as messages and tables show them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """Return a number of bytes in the largest unit up to GiB of which it is at least one."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:,.1f} {unit}"
    return f"{size:.0f} B"
