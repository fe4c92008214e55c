"""What can be given as text: single files, folders and patterns of them, and folders that the
`datasets` library saved. Everything here looks at names and first bytes only.

    .txt              one document for each file, cut into pieces (data/readers.py)
    .jsonl            one object a line, a document each
    .json             a list of objects, or one object a line
    .parquet, .arrow  a table, a document for each row
    .gz, .zst         behind .txt, .jsonl or .json: the same, compressed
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.data.pairs import is_token_file
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind, inside, reason_of, shown
from megatron_hypenet.untrusted.json_text import read_object

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow")
CODECS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
"""Suffix of a compressed file -> its first bytes."""
KINDS = ".txt, .jsonl, .json (each also as .gz or .zst), .parquet and .arrow"

_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ\0": "an xz file",
    b"BZh": "a bzip2 file",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of other kinds of files, which are sometimes given as text by mistake."""
_MAGIC = {".parquet": (b"PAR1",), ".arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
"""First bytes of tables; an Arrow stream, as `datasets` saves it, starts with a continuation
mark."""
_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_SAVED = FileKind(error=DataError, advice="save the dataset again with `save_to_disk`")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of text."""

    path: Path
    kind: str
    """Its suffix without compression: .txt, .jsonl, .json, .parquet or .arrow."""
    codec: str
    """.gz, .zst, or "" when it is not compressed."""
    size: int
    """Bytes on the disk."""
    modified_ns: int

    @property
    def splits(self) -> bool:
        """Return whether a part of the file can be read without the rest: lines that are not
        compressed."""
        return self.kind == ".jsonl" and not self.codec


@dataclass(frozen=True, slots=True)
class Found:
    """The files of one source, in the order in which they are read."""

    files: tuple[SourceFile, ...]
    left_out: tuple[Path, ...] = ()
    """Files of a folder that are no text."""

    @property
    def size(self) -> int:
        """Return the bytes on the disk of all files."""
        return sum(file.size for file in self.files)

    @property
    def note(self) -> str:
        """Return what to tell the user about files that are left out; else empty."""
        if not self.left_out:
            return ""
        names = ", ".join(path.name for path in self.left_out[:5])
        more = ", ..." if len(self.left_out) > 5 else ""
        return f"{len(self.left_out)} files are no text and are left out: {shown(names)}{more}"


def is_prepared(source: Path) -> bool:
    """Return whether `source` is meant as the prefix of a prepared pair, not as text."""
    if is_token_file(source):
        return True
    return not (os.path.lexists(source) or is_pattern(source) or kind_of(source)[0])


def is_pattern(source: Path) -> bool:
    """Return whether `source` is a pattern of names (*, ?, [...]) and no file of that name."""
    return glob.has_magic(str(source)) and not os.path.lexists(source)


def kind_of(path: Path) -> tuple[str, str]:
    """Return (kind, codec) by the suffixes of a file's name; the kind is "" when it is none of
    text."""
    suffixes = path.suffixes
    codec = suffixes[-1] if suffixes and suffixes[-1] in CODECS else ""
    kind = suffixes[-2] if codec and len(suffixes) > 1 else path.suffix
    known = TEXT_SUFFIXES if codec else (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    return (kind, codec) if kind in known else ("", "")


def find_files(source: Path) -> Found:
    """Return the files of `source`, sorted by their paths; every first byte is looked at.

    Raises DataError when there is none, one cannot be read, or one is of another kind than its name
    says.
    """
    left_out: list[Path] = []
    if is_pattern(source):
        names = sorted(map(Path, glob.glob(str(source), recursive=True)))
        paths = [path for path in names if not path.is_dir()]
        if not paths:
            raise DataError(f"{source}: no file has such a name; correct the pattern")
    elif source.is_dir():
        paths, left_out = _of_folder(source)
    else:
        paths = [source]
    return Found(tuple(map(_checked, paths)), tuple(left_out))


def _of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (files of text, other files) of a folder, sorted; of a saved dataset the files that it
    names."""
    if (folder / _SPLITS).is_file():
        splits = read_object(_SAVED, folder / _SPLITS).get("splits")
        listed = ", ".join(map(str, splits)) if isinstance(splits, list) else "its parts"
        raise DataError(
            f"{folder}: a saved dataset of several parts ({shown(listed)}); name one of them, for "
            f"example {folder}/train"
        )
    if (folder / _STATE).is_file() and (folder / "dataset_info.json").is_file():
        return _saved_dataset(folder), []
    every: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        every += [Path(root) / name for name in names if not name.startswith(".")]
    every.sort()
    paths = [path for path in every if kind_of(path)[0]]
    if not paths:
        raise DataError(f"{folder}: a folder without text; data takes {KINDS}")
    return paths, [path for path in every if not kind_of(path)[0]]


def _saved_dataset(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that `Dataset.save_to_disk` wrote."""
    state = read_object(_SAVED, folder / _STATE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: a dataset with a selection or an order of its own; write it out with "
            "`flatten_indices()` before `save_to_disk`"
        )
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not entries:
        _SAVED.refuse(folder / _STATE, "names no data files")
    files = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    return [inside(folder, name, _SAVED) for name in files]


def _checked(path: Path) -> SourceFile:
    """Return the file `path` with its kind, by its name and its first bytes."""
    if not os.path.lexists(path):
        raise DataError(
            f"{path}: no such file; data takes files ({KINDS}), folders and patterns of them, and "
            f"prefixes of prepared .bin/.idx pairs{download_hint(path, what='dataset')}"
        )
    kind, codec = kind_of(path)
    if not kind:
        raise DataError(
            f"{path}: unknown kind of data '{path.suffix}'; use {KINDS}, a folder of them, or the "
            "prefix of a .bin/.idx pair."
        )
    opened = FileKind(error=DataError, advice="name a file that can be read")
    with opened.open(path) as stream:
        try:
            head = stream.read(8)
        except OSError as error:
            opened.refuse(path, f"cannot be read: {reason_of(error)}")
        status = os.fstat(stream.fileno())
    _check_head(path, kind, codec, head)
    return SourceFile(path, kind, codec, status.st_size, status.st_mtime_ns)


def _check_head(path: Path, kind: str, codec: str, head: bytes) -> None:
    """Raise DataError when the first bytes are those of another kind of file."""
    wanted = (CODECS[codec],) if codec else _MAGIC.get(kind)
    if wanted:
        if not head.startswith(wanted):
            raise DataError(
                f"{path}: its first bytes are not those of a {codec or kind} file; it is damaged, "
                "or its name is wrong"
            )
        return
    for magic, name in _OTHER_KINDS.items():
        if head.startswith(magic):
            how = (
                "convert it first"
                if "UTF" in name
                else "give it the suffix of its kind"
                if "gzip" in name or "zstd" in name or "Parquet" in name or "Arrow" in name
                else "unpack it first"
            )
            raise DataError(f"{path}: not text but {name}; {how}.")
