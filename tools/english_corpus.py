#!/usr/bin/env python3
"""Make a corpus of real English text from Debian packages: training documents, and held-out ones.

    python tools/english_corpus.py build/english --tokenizer build/smollm2

writes into build/english

    train.jsonl, heldout.jsonl   a document a line: {"text": ..., "package": ...}
    heldout.txt                  the held-out documents as one text, for `hypenet eval --text`
    manifest.json                packages with versions, sizes, SHA-256 and licences, the commands,
                                 and documents, characters and tokens of each

and keeps packages in build/english.packages. Paragraphs are prose (code, tables and headings are
left out) and occur once in the whole corpus; which documents are held out depends on the seed and
on their text alone, so no paragraph is on both sides and the order of files does not matter.
One file, because a third of it is the list of packages, each with its reader.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from megatron_hypenet.atomic_files import write_json  # noqa: E402
from megatron_hypenet.checkpoint.format import refuse_existing  # noqa: E402
from megatron_hypenet.errors import DataError, HypenetError, UsageError  # noqa: E402
from megatron_hypenet.export.staging import staged  # noqa: E402
from megatron_hypenet.untrusted.files import MIB, FileKind, reason_of, shown  # noqa: E402
from tools.debian_text import (  # noqa: E402
    Document,
    Package,
    Source,
    fetch,
    read_austen,
    read_bible,
    read_html,
)

LEAST_PARAGRAPH, LEAST_DOCUMENT = 40, 500
"""Fewest characters of a paragraph and of a document."""
GROUP = 8000
"""Characters up to which the short entries of a dictionary are one document."""
_FILE = FileKind(
    error=DataError, advice="remove the unpacked packages and run again", max_bytes=128 * MIB
)
_DIGITS = {
    c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
"""dictd's digits of numbers to the base of 64."""


def clean(text: str) -> str | None:
    """Return a paragraph on one line, or None when it is not prose: short, without the end of a
    sentence, or more than a fifth symbols and digits."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if len(text) < LEAST_PARAGRAPH or text[-1] not in ".!?:;\"')”’" or "\ufffd" in text:
        return None
    letters = sum(c.isalpha() or c == " " for c in text)
    return text if letters >= 0.8 * len(text) else None


def text_of(path: Path) -> str:
    """Return the text of a file, which may be compressed by gzip or dictzip; bytes that are not
    UTF-8 become U+FFFD. DataError for a damaged file and above 128 MiB."""
    content = _FILE.read_bytes(path)
    if path.suffix in (".gz", ".dz"):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
                content = stream.read(_FILE.max_bytes + 1)
        except (OSError, EOFError, ValueError) as error:
            _FILE.refuse(path, f"cannot be decompressed: {shown(reason_of(error))}")
        if len(content) > _FILE.max_bytes:
            _FILE.refuse(path, f"holds more than {_FILE.max_bytes // MIB} MiB")
    return content.decode("utf-8", errors="replace")


def read_pod(pattern: str) -> Callable[[Path], Iterator[Document]]:
    """Make a reader of Perl's documentation: paragraphs that are neither commands nor code, with
    the marks around words taken off."""

    def read(root: Path) -> Iterator[Document]:
        for path in sorted(root.glob(pattern)):
            paragraphs = [p for p in text_of(path).split("\n\n") if p[:1] not in ("=", " ", "\t")]
            yield [_without_marks(paragraph) for paragraph in paragraphs]

    return read


def _without_marks(text: str) -> str:
    """Return POD text without formatting codes: C<x>, C<< x > y >>, L<shown|target>, nested ones
    from the inside out. Angles that are text are kept aside as ‹ and › meanwhile."""
    aside = str.maketrans("<>", "‹›")
    text = text.replace("E<gt>", "›").replace("E<lt>", "‹")
    text = re.sub(r"[BCFILS]<<+\s+(.*?)\s+>>+", lambda code: code[1].translate(aside), text)
    text = re.sub(r"[XZ]<[^<>]*>", "", text.replace("->", "-›").replace("=>", "=›"))
    before = None
    while before != text:
        before = text
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        text = re.sub(r"[BCFILS]<([^<>]*)>", r"\1", text)
    return text.translate(str.maketrans("‹›", "<>"))


def read_dictionary(name: str) -> Callable[[Path], Iterator[Document]]:
    """Make a reader of a dictd dictionary: neighbouring entries, in the order of the alphabet, are
    a document of about `GROUP` characters. Cross references lose their braces."""

    def read(root: Path) -> Iterator[Document]:
        folder = root / "usr/share/dictd"
        whole = text_of(folder / f"{name}.dict.dz").encode()
        entries: list[Document] = []
        places = set()
        for line in text_of(folder / f"{name}.index").splitlines():
            word, _, place = line.partition("\t")
            fields = place.split("\t")
            if len(fields) != 2 or any(c not in _DIGITS for field in fields for c in field):
                _FILE.refuse(folder / f"{name}.index", f"not a line of an index: {shown(line, 60)}")
            if not word.startswith("00database"):
                places.add(tuple(map(_base64, fields)))
        for start, length in sorted(places):
            text = whole[start : start + length].decode("utf-8", errors="replace")
            text = re.sub(r"[{}]|\[[^\]]*(?:Webster|PJC|WordNet)[^\]]*\]", "", text)
            entries.append(re.split(r"\n\s*\n", text))
        yield from grouped(entries)

    return read


def _base64(text: str) -> int:
    number = 0
    for digit in text:
        number = 64 * number + _DIGITS[digit]
    return number


def read_wordnet(root: Path) -> Iterator[Document]:
    """Yield WordNet's explanations of words, some hundred a document: "word, word: explanation."""
    for kind in ("noun", "verb", "adj", "adv"):
        path = root / f"usr/share/wordnet/data.{kind}"
        entries: list[Document] = []
        for line in text_of(path).splitlines():
            place, _, gloss = line.partition(" | ")
            fields = place.split()
            if line.startswith("  ") or not gloss:  # the licence at the top
                continue
            count = int(fields[3], 16) if re.fullmatch("[0-9a-f]{2}", fields[3]) else 0
            if not 0 < count <= (len(fields) - 4) // 2:
                _FILE.refuse(path, f"not a line of WordNet: {shown(line, 60)}")
            words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            entries.append([f"{', '.join(words)}: {gloss.strip()}."])
        yield from grouped(entries)


def read_text(pattern: str) -> Callable[[Path], Iterator[Document]]:
    """Make a reader of plain text files with blank lines between paragraphs."""

    def read(root: Path) -> Iterator[Document]:
        for path in sorted(root.glob(pattern)):
            yield re.split(r"\n\s*\n", text_of(path))

    return read


def read_fortunes(root: Path) -> Iterator[Document]:
    """Yield fortune cookies, a file's neighbours together: sayings and short stories between lines
    with a per cent sign."""
    for path in sorted((root / "usr/share/games/fortunes").glob("*")):
        if path.suffix not in (".dat", ".u8") and path.is_file():
            yield from grouped([[one] for one in re.split(r"^%\n", text_of(path), flags=re.M)])


def grouped(entries: Iterable[Document]) -> Iterator[Document]:
    """Join neighbouring short documents until they have `GROUP` characters."""
    group: Document = []
    size = 0
    for entry in entries:
        group += entry
        size += sum(map(len, entry))
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def read_rst(pattern: str) -> Callable[[Path], Iterator[Document]]:
    """Make a reader of reStructuredText: paragraphs that are not indented and neither headings nor
    directives, with the marks around words taken off."""

    def read(root: Path) -> Iterator[Document]:
        for path in sorted(root.glob(pattern)):
            paragraphs = re.split(r"\n\s*\n", text_of(path))
            prose = [p for p in paragraphs if re.match(r"\S", p) and not p.startswith((".. ", ":"))]
            yield [
                _without_roles(p) for p in prose if not re.search(r"^([=~^*+#\"-])\1{3,}", p, re.M)
            ]

    return read


_UNDERLINE = r"^([=~^*+#\"-])\1{3,}"


def _without_roles(text: str) -> str:
    """Return reStructuredText without its inline marks."""
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_?_?", r"\1", re.sub(r":[\w:+-]+:(?=`)", "", text))
    text = re.sub(r"``?([^`]+)``?_?_?|\*\*?([^*\s][^*]*)\*\*?", r"\1\2", text)
    return re.sub(r"::\s*$", ":", re.sub(r"^(?:[-*#] |\d+[.)] )", "", text))


def _html(package: str, title: str, licence: str, *patterns: str) -> Source:
    return Source(package, title, licence, read_html(*(f"usr/share/{p}" for p in patterns)))


def _rst(package: str, title: str, licence: str, folder: str) -> Source:
    return Source(package, title, licence, read_rst(f"usr/share/doc/{folder}/_sources/**/*.txt"))


def _dictionary(name: str, title: str, licence: str) -> Source:
    return Source(f"dict-{name}", title, licence, read_dictionary(name))


_RUST_BOOKS = ("book", "edition-guide", "embedded-book", "nomicon", "reference", "rustc")

SOURCES = (
    Source(
        "bible-kjv-text", "King James Bible", "public domain", read_bible, needs=("bible-kjv",)
    ),
    Source("r-cran-janeaustenr", "Jane Austen, six novels", "public domain", read_austen),
    _html("anarchism", "An Anarchist FAQ", "GPL-2", "doc/anarchism/html/*.html"),
    _dictionary("gcide", "GNU Collaborative International Dictionary", "GPL-2+"),
    _dictionary("foldoc", "Free On-line Dictionary of Computing", "GFDL-1.2+"),
    _dictionary("jargon", "The Jargon File", "public domain"),
    _dictionary("devil", "The Devil's Dictionary", "public domain"),
    Source("wordnet-base", "WordNet 3.0, explanations", "WordNet 3.0", read_wordnet),
    Source("miscfiles", "Declaration and constitution of the United States", "public domain",
           read_text("usr/share/state/*.gz")),
    Source("fortunes", "Fortune cookies", "BSD-4-clause (collection)", read_fortunes),
    Source("perl-doc", "Perl documentation", "GPL-1+ or Artistic",
           read_pod("usr/share/perl/*/pod/*.pod")),
    _html("debian-handbook", "The Debian Administrator's Handbook", "CC-BY-SA-3.0 or GPL-2+",
          "doc/debian-handbook/html/en-US/*.html"),
    _html("debian-reference-en", "Debian Reference", "GPL-2+", "debian-reference/*.en.html"),
    _html("gnome-user-docs", "GNOME help", "CC-BY-SA-3.0", "help/C/**/*.page"),
    _html("gimp-help-en", "GIMP help", "GFDL-1.2+", "gimp/2.0/help/en/*.html"),
    _html("libreoffice-help-en-us", "LibreOffice help", "MPL-2.0",
          "libreoffice/help/en-US/text/**/*.html"),
    _html("postgresql-doc-15", "PostgreSQL documentation", "PostgreSQL",
          "doc/postgresql-doc-15/html/*.html"),
    _html("apache2-doc", "Apache HTTP Server documentation", "Apache-2.0",
          "doc/apache2-doc/manual/en/**/*.html"),
    _html("sqlite3-doc", "SQLite documentation", "public domain", "doc/sqlite3/**/*.html"),
    _html("git-doc", "Git documentation", "GPL-2", "doc/git-doc/**/*.html"),
    _html("octave-doc", "GNU Octave manual", "GPL-3+", "doc/octave/octave.html/*.html"),
    _html("rust-doc", "The Rust books", "MIT or Apache-2.0",
          *(f"doc/rust-doc/html/{book}/**/*.html" for book in _RUST_BOOKS)),
    _html("python-django-doc", "Django documentation", "BSD-3-clause",
          "doc/python-django-doc/html/**/*.html"),
    _rst("linux-doc-6.1", "Linux kernel documentation", "GPL-2", "linux-doc-6.1/html"),
    _rst("python3.11-doc", "Python documentation", "PSF-2.0", "python3.11/html"),
    _rst("python-pandas-doc", "pandas documentation", "BSD-3-clause", "python-pandas-doc/html"),
    _rst("python-sklearn-doc", "scikit-learn documentation", "BSD-3-clause",
         "python-sklearn-doc/html"),
    _rst("python-astropy-doc", "Astropy documentation", "BSD-3-clause", "python-astropy-doc/html"),
)  # fmt: skip
"""Titles and licences as the packages' copyright files have them; Debian 12."""


@dataclass(frozen=True)
class Counts:
    """What is in one part of the corpus."""

    documents: int = 0
    characters: int = 0
    tokens: int | None = None


def documents(source: Source, root: Path, seen: set[bytes]) -> Iterator[str]:
    """Yield a source's documents: clean paragraphs that are not in `seen`, which they join, with an
    empty line between them."""
    for document in source.read(root):
        kept = []
        for paragraph in filter(None, map(clean, document)):
            digest = hashlib.blake2b(paragraph.lower().encode(), digest_size=12).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= LEAST_DOCUMENT:
            yield text


def order_of(text: str, seed: int) -> float:
    """Return the place of a document in a seeded order, from 0 to 1: equal for equal texts."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") / 2**64


def build(
    sources: Sequence[Source],
    packages: Sequence[Package],
    roots: Path,
    out: Path,
    *,
    heldout: float,
    seed: int,
    count_tokens: Callable[[list[str]], int] | None,
    commands: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the corpus `out` from the packages unpacked in `roots`, and return its manifest.

    `heldout` is the share of documents that are held out. `count_tokens` returns the number of
    tokens of texts. DataError for a damaged file and for a package without text; nothing is then
    left at `out`.
    """
    seen: set[bytes] = set()
    parts: dict[str, list[tuple[float, str, str]]] = {"train": [], "heldout": []}
    table = []
    for source in sources:
        root = roots / source.package
        found = sorted((order_of(text, seed), text) for text in documents(source, root, seen))
        if not found:
            raise DataError(
                f"{root}: the package {source.package} gave no text; its files may have moved in "
                "this release of Debian: adapt SOURCES in tools/english_corpus.py"
            )
        for place, text in found:
            part = "heldout" if place < heldout else "train"
            parts[part].append((place, source.package, text))
        row = _row(source, [p for p in packages if p.name in (source.package, *source.needs)])
        row |= vars(_counts([text for _, text in found], count_tokens))
        table.append(row)
        say(f"{source.package}: {row['documents']:,} documents, {row['characters']:,} characters")
    manifest: dict[str, Any] = {"commands": list(commands), "seed": seed, "heldout": heldout}
    refuse = _refusal(out)
    refuse()
    with staged(out, refuse=refuse) as folder:
        for part, rows in parts.items():
            rows.sort()
            with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as stream:
                for _, package, text in rows:
                    record = {"text": text, "package": package}
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            manifest[f"{part}_part"] = vars(_counts([text for *_, text in rows], count_tokens))
        whole = "\n\n".join(text for *_, text in parts["heldout"])
        (folder / "heldout.txt").write_text(whole + "\n", encoding="utf-8")
        manifest["packages"] = table
        write_json(folder / "manifest.json", manifest)
    return manifest


def _refusal(out: Path) -> Callable[[], None]:
    return lambda: refuse_existing(out, False)


def _counts(texts: list[str], count_tokens: Callable[[list[str]], int] | None) -> Counts:
    tokens = count_tokens(texts) if count_tokens is not None else None
    return Counts(len(texts), sum(map(len, texts)), tokens)


def _row(source: Source, packages: Sequence[Package]) -> dict[str, Any]:
    debs = [
        {
            "name": package.name,
            "version": package.version,
            "architecture": package.architecture,
            "bytes": package.size,
            "sha256": package.sha256,
        }
        for package in packages
    ]
    return {"title": source.title, "licence": source.licence, "debs": debs}


def token_counter(folder: Path) -> Callable[[list[str]], int]:
    """Return a function that counts the tokens of texts with the tokenizer in `folder`."""
    from megatron_hypenet.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def count(texts: list[str]) -> int:
        total = 0
        for start in range(0, len(texts), 256):
            found = tokenizer(texts[start : start + 256], add_special_tokens=False)
            total += sum(map(len, found["input_ids"]))
        return total

    return count


def main(arguments: list[str] | None = None) -> int:
    """Build the corpus as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--tokenizer", type=Path, help="a model folder: count its tokens")
    parser.add_argument("--packages", type=Path, help="where .deb files are kept (OUT.packages)")
    parser.add_argument("--only", help="names of packages, with commas; default: all of them")
    parser.add_argument("--heldout", type=float, default=0.03, help="share of documents held out")
    parser.add_argument("--seed", type=int, default=20261127, help="of the order and the split")
    options = parser.parse_args(arguments)
    try:
        _build(options, arguments)
    except HypenetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _build(options: argparse.Namespace, arguments: list[str] | None) -> None:
    known = {source.package: source for source in SOURCES}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--only {unknown[0]}: known packages are {', '.join(known)}")
    if not 0 < options.heldout < 1 or not 0 <= options.seed < 2**64:
        raise UsageError("--heldout is a share between 0 and 1, --seed a number of 64 bits")
    _refusal(options.out)()
    counter = token_counter(options.tokenizer) if options.tokenizer else None
    sources = [known[name] for name in names]
    folder = options.packages or options.out.with_name(f"{options.out.name}.packages")
    packages = fetch(sources, folder)
    words = sys.argv[1:] if arguments is None else arguments
    commands = [
        f"apt-get download {' '.join(package.name for package in packages)}",
        f"python tools/english_corpus.py {' '.join(words)}",
    ]
    manifest = build(
        sources,
        packages,
        folder,
        options.out,
        heldout=options.heldout,
        seed=options.seed,
        count_tokens=counter,
        commands=commands,
        say=lambda line: print(line, file=sys.stderr),
    )
    for part in ("train", "heldout"):
        print(f"{part}: {json.dumps(manifest[f'{part}_part'])}")


if __name__ == "__main__":
    sys.exit(main())
