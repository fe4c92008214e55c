"""Make a folder that people or other programs read, complete or not at all. Checkpoints have their
own way, with a marker (checkpoint/format.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.checkpoint.format import fsync_tree, put_in_place
from megatron_hypenet.errors import ConversionError, SetupError, is_disk_full


@contextmanager
def staged(target: Path, *, refuse: Callable[[], None]) -> Iterator[Path]:
    """Provide a temporary sibling that becomes `target` when the block succeeds and is removed
    otherwise.

    `refuse` raises where what exists at `target` may not be replaced; it is called before that
    happens. SetupError when the disk is full, ConversionError for other errors of the file system.
    """
    temporary = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        fsync_tree(temporary)
        refuse()
        put_in_place(temporary, target)
    except OSError as error:
        if is_disk_full(error):
            raise SetupError(
                f"cannot write {target}: no space left on the disk; nothing was left there. "
                "Free space or choose another folder"
            ) from error
        raise ConversionError(
            f"cannot write {target}: {error}; nothing was left there. Choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
