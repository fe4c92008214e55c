"""What every launcher's plan of a start can do, whatever machines it is for."""

from __future__ import annotations

from typing import Any, Protocol


class Launch(Protocol):
    """Several processes of one command, about to be started."""

    def start(self) -> int:
        """Say so on stderr, start the processes, wait for them, and return the exit code: 0, or
        that of the one that failed first."""

    def describe(self) -> dict[str, Any]:
        """Return the exact start, for --dry-run."""

    def lines(self) -> list[str]:
        """Return `describe` as lines for a person."""
