"""The files of a prepared pair, by their names; without numpy, for commands that only plan."""

from __future__ import annotations

from pathlib import Path

INDEX_FILE = "corpus.json"
"""What is known of all data of a run, in its folder of token files."""


def token_paths(prefix: Path) -> tuple[Path, Path]:
    """Return (prefix.bin, prefix.idx)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def mask_path(prefix: Path) -> Path:
    """Return prefix.mask, which a pair has when only a part of its tokens is trained on."""
    return Path(f"{prefix}.mask")


def is_token_file(prefix: Path) -> bool:
    """Return whether both files of the pair exist."""
    return all(path.is_file() for path in token_paths(prefix))
