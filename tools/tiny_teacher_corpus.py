"""English prose for the bundled tiny teacher, taken from Debian packages whose licences allow
redistribution.

Each source is one package; a reader turns its files into documents, each a list of paragraphs.
Code, tables and navigation are left out. Documents are cut into blocks of about 12 kB; a hash of
the block decides which split it belongs to, so the held-out text is the same whatever order the
files are read in and never shares a paragraph with the training text (paragraphs are unique in the
corpus).
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import re
import struct
import subprocess
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_CHARACTERS = 12_000
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
_PLAIN = str.maketrans(
    {
        "\u2019": "'",
        "\u2018": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u00a0": " ",
        "\u2026": "...",
    }
)


@dataclass(frozen=True)
class Source:
    """One Debian package and how to read it."""

    package: str
    title: str
    licence: str
    read: Callable[[Path], Iterator[Document]]
    """Unpacked package folder -> documents."""
    shippable: bool
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


def clean_paragraph(text: str) -> str | None:
    """Return plain ASCII on one line, or None when the paragraph is not prose (short, no sentence
    end, or full of symbols)."""
    text = unicodedata.normalize("NFKD", text.translate(_PLAIN)).encode("ascii", "ignore").decode()
    text = " ".join(text.split())
    if len(text) < 60 or text[-1] not in ".!?:;\"')":
        return None
    letters = sum(c.isalpha() or c == " " for c in text)
    return text if letters >= 0.9 * len(text) else None


def read_html(pattern: str) -> Callable[[Path], Iterator[Document]]:
    """Make a reader of every page matching the glob `pattern` under the package folder."""

    def read(root: Path) -> Iterator[Document]:
        for path in sorted(root.glob(pattern)):
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


def read_jargon(root: Path) -> Iterator[Document]:
    """Yield the Jargon File: a gzip-compatible dictionary, paragraphs indented by four spaces."""
    text = gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode(
        "utf-8", errors="ignore"
    )
    text = re.sub(r"[{}]", "", text)
    yield re.split(r"\n\s*\n", text)


SOURCES = (
    Source("r-cran-janeaustenr", "Jane Austen, six novels", "public domain", read_austen, True),
    Source(
        "bible-kjv-text",
        "King James Bible",
        "public domain",
        read_bible,
        True,
        needs=("bible-kjv",),
    ),
    Source("dict-jargon", "The Jargon File 4.4.7", "public domain", read_jargon, True),
    Source(
        "sqlite3-doc",
        "SQLite documentation",
        "public domain",
        read_html("usr/share/doc/sqlite3/**/*.html"),
        True,
    ),
    Source(
        "python3.11-doc",
        "Python documentation",
        "PSF-2.0",
        read_html("usr/share/doc/python3.11/html/**/*.html"),
        False,
    ),
    Source(
        "postgresql-doc-15",
        "PostgreSQL documentation",
        "PostgreSQL",
        read_html("usr/share/doc/postgresql-doc-15/html/*.html"),
        False,
    ),
    Source(
        "apache2-doc",
        "Apache HTTP Server documentation",
        "Apache-2.0",
        read_html("usr/share/doc/apache2-doc/manual/en/**/*.html"),
        False,
    ),
    Source(
        "rust-doc",
        "The Rust books and standard library pages",
        "MIT or Apache-2.0",
        read_html("usr/share/doc/rust-doc/html/[benrs]*/**/*.html"),
        False,
    ),
)


def fetch(sources: tuple[Source, ...], folder: Path) -> None:
    """Download each source's packages with apt and unpack them into `folder/<package>`; nothing is
    installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if (folder / source.package).is_dir():
            continue
        names = (source.package, *source.needs)
        subprocess.run(["apt-get", "download", *names], check=True, cwd=folder)
        for name in names:
            archive = next(folder.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg", "-x", str(archive), str(folder / source.package)], check=True)


def blocks(source: Source, root: Path, seen: set[bytes]) -> Iterator[str]:
    """Clean, unique paragraphs of one source, joined into blocks of about `BLOCK_CHARACTERS`; a
    block never spans two documents."""
    for document in source.read(root):
        block: list[str] = []
        for raw in document:
            paragraph = clean_paragraph(raw)
            if paragraph is None:
                continue
            digest = hashlib.blake2b(paragraph.lower().encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
            block.append(paragraph)
            if sum(map(len, block)) >= BLOCK_CHARACTERS:
                yield "\n\n".join(block)
                block = []
        if sum(map(len, block)) >= 400:
            yield "\n\n".join(block)


def is_heldout(block: str) -> bool:
    """Choose one block in 24 by the hash of its text."""
    return int.from_bytes(hashlib.blake2b(block.encode(), digest_size=4).digest(), "big") % 24 == 0
