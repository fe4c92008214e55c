"""Text in Debian packages: how packages are fetched and unpacked, and readers that turn their files
into documents, each a list of paragraphs.

Corpora differ in the packages that they take and in how they clean paragraphs
(tiny_teacher_corpus.py, english_corpus.py); this is what they share.
"""

from __future__ import annotations

import hashlib
import html.parser
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.errors import SetupError
from megatron_hypenet.untrusted.files import shown

Document = list[str]

_SKIPPED_TAGS = {
    "pre",
    "script",
    "style",
    "table",
    "nav",
    "header",
    "footer",
    "title",
    "code-block",
    "svg",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
}
_PARAGRAPH_TAGS = {
    "p",
    "li",
    "dd",
    "div",
    "section",
    "blockquote",
    "ul",
    "ol",
    "dl",
    "dt",
    "article",
    "main",
    "body",
}


@dataclass(frozen=True)
class Source:
    """One Debian package and how to read it."""

    package: str
    title: str
    licence: str
    read: Callable[[Path], Iterator[Document]]
    """Unpacked package folder -> documents."""
    shippable: bool = False
    """Public domain: its text may also go into the shipped sample and held-out files."""
    needs: tuple[str, ...] = ()
    """Further packages that must be unpacked into the same folder."""


class _ProseParser(html.parser.HTMLParser):
    """Collects the running text of an HTML page, one string per block element."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._skipping = 0
        self._text: list[str] = []

    def flush(self) -> None:
        self.paragraphs.append("".join(self._text))
        self._text = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED_TAGS:
            self._skipping += 1
        if tag in _PARAGRAPH_TAGS or tag in _SKIPPED_TAGS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED_TAGS:
            self._skipping = max(0, self._skipping - 1)
        if tag in _PARAGRAPH_TAGS or tag in _SKIPPED_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)


def read_html(*patterns: str) -> Callable[[Path], Iterator[Document]]:
    """Make a reader of every page matching one of the glob `patterns` under the package folder."""

    def read(root: Path) -> Iterator[Document]:
        for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
            parser = _ProseParser()
            parser.feed(path.read_text(encoding="utf-8", errors="ignore"))
            parser.flush()
            yield parser.paragraphs

    return read


def read_austen(root: Path) -> Iterator[Document]:
    """Yield the novels in r-cran-janeaustenr: R character vectors, one string a line, in the
    package's lazy-load file."""
    database = next(root.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")).read_bytes()
    offset = 0
    while offset + 4 < len(database):
        inflate = zlib.decompressobj()
        serialized = inflate.decompress(database[offset + 4 :])
        offset = len(database) - len(inflate.unused_data)
        lines = []
        position = 0
        # a CHARSXP is the flag word (type 9, some encoding bits), its length and its bytes, all
        # big-endian
        header = re.compile(rb"\x00[\x00-\x0f][\x00-\xff]\x09", re.DOTALL)
        while match := header.search(serialized, position):
            (length,) = struct.unpack_from(">i", serialized, match.end())
            start = match.end() + 4
            if not 0 <= length < 2000:
                position = match.start() + 1
                continue
            lines.append(serialized[start : start + length].decode("utf-8", errors="ignore"))
            position = start + length
        yield "\n".join(lines).split("\n\n")


def read_bible(root: Path) -> Iterator[Document]:
    """Yield the King James text, a chapter a paragraph; the reader program unpacks its own
    compressed data file."""
    command = [
        str(root / "usr/bin/bible"),
        "-p",
        str(root / "usr/lib"),
        "-l100000",
        "gen1:1-rev22:21",
    ]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="ignore", input=""
    ).stdout
    chapter: list[str] = []
    for line in text.splitlines():
        verse = re.match(r"^\s*(?:[1-3]?\w+\s?\d+:)?(\d+)\s+(.*)$", line)
        if not verse:
            continue
        if verse.group(1) == "1" and chapter:
            yield [" ".join(chapter[i : i + 4]) for i in range(0, len(chapter), 4)]
            chapter = []
        chapter.append(verse.group(2))
    yield [" ".join(chapter[i : i + 4]) for i in range(0, len(chapter), 4)]


@dataclass(frozen=True)
class Package:
    """One downloaded package."""

    name: str
    version: str
    architecture: str
    size: int
    """Bytes of the .deb file."""
    sha256: str
    file: Path


def fetch(sources: Sequence[Source], folder: Path) -> list[Package]:
    """Download each source's packages with apt and unpack them into `folder/<package>`; nothing is
    installed, and what is there already is not fetched again.

    apt checks the archive's signatures. Raise SetupError without apt, or when it fails.
    """
    folder = folder.absolute()  # commands run in it
    folder.mkdir(parents=True, exist_ok=True)
    packages = []
    for source in sources:
        names = (source.package, *source.needs)
        found = [_downloaded(name, folder) for name in names]
        if not (folder / source.package).is_dir():
            unpacking = temporary_beside(folder / source.package)
            shutil.rmtree(unpacking, ignore_errors=True)
            for package in found:
                _run(["dpkg-deb", "--extract", str(package.file), str(unpacking)], folder)
            unpacking.rename(folder / source.package)
        packages += found
    return packages


def _downloaded(name: str, folder: Path) -> Package:
    """Return the package `name`, which apt downloads unless a .deb of it is in `folder`."""
    files = sorted(folder.glob(f"{name}_*.deb"))
    if not files:
        _run(["apt-get", "download", name], folder)
        files = sorted(folder.glob(f"{name}_*.deb"))
    if len(files) != 1:
        there = ", ".join(file.name for file in files) or "none"
        raise SetupError(f"{folder}: expected one file {name}_*.deb, found {there}; remove others")
    (file,) = files
    fields = _run(["dpkg-deb", "--field", str(file), "Version", "Architecture"], folder)
    version, architecture = (line.partition(": ")[2] for line in fields.splitlines())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Package(name, version, architecture, file.stat().st_size, digest, file)


def _run(command: list[str], folder: Path) -> str:
    """Run `command` in `folder` and return what it printed; SetupError when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    except FileNotFoundError:
        raise SetupError(
            f"{command[0]} is missing: text comes from Debian packages, so this needs Debian or "
            "Ubuntu"
        ) from None
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise SetupError(f"{' '.join(command)} failed: {shown(reason)}; try apt-get update first")
    return done.stdout
