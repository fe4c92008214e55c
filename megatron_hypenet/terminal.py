"""The terminal that this process writes to, which may be closed while the process goes on."""

from __future__ import annotations

import os


def _is_terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:
        return False


_TERMINALS = [stream for stream in (1, 2) if _is_terminal(stream)]
"""Output and errors, where they go to a terminal; one that is gone no longer tells."""


def leave_terminal() -> None:
    """Send what this process writes to its terminal to nowhere: where the terminal is gone, writing
    would fail, and a save with it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in _TERMINALS:
        os.dup2(nowhere, stream)
    os.close(nowhere)
