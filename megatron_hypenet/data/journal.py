"""How far a preparation has come, on the disk beside its unfinished files, so that the same command
goes on after it was killed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.data.readers import Place
from megatron_hypenet.errors import DataError, UsageError
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import read_typed

FILE = "progress.json"
_SHOWN = 5
_KIND = FileKind(
    error=DataError,
    advice="delete its folder, and the preparation starts again",
    max_bytes=1 << 28,
)


@dataclass(frozen=True, slots=True)
class Empty:
    """Records without a text."""

    count: int = 0
    first: tuple[str, ...] = ()
    """Places of the first few."""

    def with_more(self, places: list[str]) -> Empty:
        """Return these places and more."""
        return Empty(self.count + len(places), (*self.first, *places)[: _SHOWN + 1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """The state of a preparation that is on the disk."""

    job: dict[str, Any]
    """What is prepared, and how: a preparation of anything else does not go on with this one."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each unfinished file that belong to `place`."""
    place: Place = field(default_factory=Place)
    documents: int = 0
    tokens: int = 0
    answers: int = 0
    """Tokens that count in the loss, of a pair with a mask."""
    empty: Empty = field(default_factory=Empty)
    finishing: bool = False
    """Whether everything is read, and only moving into place is left."""

    def write(self, folder: Path) -> None:
        """Write it into the folder of the unfinished files."""
        write_json(folder / FILE, asdict(self))


def working_folder(out: Path) -> Path:
    """Return the folder of the unfinished files of `out`."""
    return out.with_name(f"{out.name}.preparing")


def is_finishing(out: Path) -> bool:
    """Return whether an earlier preparation of `out` was stopped while its files moved into
    place."""
    folder = working_folder(out)
    return has_entry(folder / FILE) and read_typed(_KIND, folder / FILE, Journal).finishing


def earlier(out: Path, job: dict[str, Any], *, overwrite: bool) -> Journal | None:
    """Return the journal of a preparation of the same `job` that was stopped; None where there is
    none.

    Raises UsageError for one of another job, unless `overwrite` gives that one up.
    """
    folder = working_folder(out)
    if not has_entry(folder / FILE):
        return None
    found = read_typed(_KIND, folder / FILE, Journal)
    changed = sorted(key for key in {**job, **found.job} if job.get(key) != found.job.get(key))
    if not changed:
        return found
    if overwrite:
        return None
    raise UsageError(
        f"{folder} holds the beginning of another preparation (another {', '.join(changed)}); give "
        "that command again to go on with it, or --overwrite to give it up, or choose another "
        "prefix"
    )
