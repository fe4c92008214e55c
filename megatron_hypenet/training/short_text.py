"""Counts and times as short text for log lines; no tensor library is imported here."""

from __future__ import annotations


def short_count(value: float) -> str:
    """Format a count: 1234 -> 1.2k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    """Format seconds: 72 -> 1m12s, 3700 -> 1h01m."""
    whole = int(round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
