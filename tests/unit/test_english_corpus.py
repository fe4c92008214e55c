"""The corpus of English text, from small packages that dpkg-deb builds here."""

import gzip
import json
import shutil
import stat
import subprocess

import pytest

from megatron_hypenet.errors import CheckpointError, DataError, SetupError
from tools import debian_text, english_corpus
from tools.debian_text import Source, fetch, read_html
from tools.english_corpus import (
    SOURCES,
    build,
    clean,
    documents,
    grouped,
    main,
    order_of,
    read_dictionary,
    read_fortunes,
    read_pod,
    read_rst,
    read_text,
    read_wordnet,
)


def sentence(number: int) -> str:
    return f"This is sentence {'x' * (number % 7)} of page {chr(97 + number)} in a long tale. " * 3


def page(number: int) -> str:
    body = "".join(f"<p>{sentence(number + i)} {'abcdefghij'[i]}.</p>" for i in range(4))
    return f"<html><head><title>T</title></head><body><h1>H</h1>{body}<pre>code()</pre></body>"


@pytest.fixture
def tree(tmp_path):
    """Write an unpacked package with ten pages."""
    folder = tmp_path / "roots" / "stories" / "usr/share/doc/stories"
    folder.mkdir(parents=True)
    for number in range(10):
        (folder / f"{number}.html").write_text(page(number))
    return tmp_path / "roots"


STORIES = Source("stories", "Ten stories", "MIT", read_html("usr/share/doc/stories/*.html"))


def made(tree, out, *, heldout=0.3, seed=1, sources=(STORIES,)):
    return build(
        sources, [], tree, out, heldout=heldout, seed=seed, commands=["a command"],
        count_tokens=lambda texts: sum(len(text.split()) for text in texts), say=lambda line: None,
    )  # fmt: skip


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_paragraph_is_prose_on_one_line():
    assert clean("  A whole\n sentence that is   long enough, café “yes”. ") == (
        "A whole sentence that is long enough, café “yes”."
    )
    for text in (
        "Too short.",
        "A line that is long enough but has no end of a sentence",
        "x = f(1, 2) + g[3] ** 4; y = {5: 6}; z = 7 + 8 - 9 * 10;",
        "A sentence with a byte \ufffd that could not be read as UTF-8 text.",
    ):
        assert clean(text) is None, text


def test_documents_are_split_by_seed_and_no_paragraph_is_on_both_sides(tree, tmp_path):
    manifest = made(tree, tmp_path / "a")
    train, heldout = (records(tmp_path / "a" / f"{part}.jsonl") for part in ("train", "heldout"))
    assert train and heldout
    assert all(row["package"] == "stories" for row in train + heldout)
    sides = [{p for row in rows for p in row["text"].split("\n\n")} for rows in (train, heldout)]
    assert not sides[0] & sides[1]
    # of neighbouring pages, three paragraphs of four are alike: they occur once
    paragraphs = [p for row in train + heldout for p in row["text"].split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert not any("code()" in p or p == "H" for p in paragraphs)
    text = (tmp_path / "a" / "heldout.txt").read_text()
    assert text == "\n\n".join(row["text"] for row in heldout) + "\n"
    for part, rows in (("train_part", train), ("heldout_part", heldout)):
        assert manifest[part]["documents"] == len(rows)
        assert manifest[part]["characters"] == sum(len(row["text"]) for row in rows)
        assert manifest[part]["tokens"] == sum(len(row["text"].split()) for row in rows)
    assert manifest == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["commands"] == ["a command"] and manifest["seed"] == 1
    made(tree, tmp_path / "b")
    for name in ("train.jsonl", "heldout.jsonl", "heldout.txt", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    made(tree, tmp_path / "c", seed=2)
    assert records(tmp_path / "c" / "heldout.jsonl") != heldout


def test_the_side_of_a_document_depends_on_nothing_else():
    texts = [sentence(number) for number in range(20)]
    assert [order_of(text, 5) for text in texts] == [order_of(text, 5) for text in texts]
    places = [order_of(f"text {number}", 5) for number in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert abs(sum(place < 0.1 for place in places) - 200) < 60


def test_short_documents_are_left_out_and_short_entries_joined(tree):
    assert list(documents(Source("x", "", "", lambda _: iter([["Short one."]])), tree, set())) == []
    entries = [[f"entry {number} " * 100] for number in range(20)]
    found = list(grouped(entries))
    assert [one for group in found for one in group] == [one for e in entries for one in e]
    assert all(sum(map(len, group)) >= english_corpus.GROUP for group in found[:-1])


def test_perl_pages_lose_commands_code_and_marks(tmp_path):
    (tmp_path / "a.pod").write_text(
        "=head1 NAME\n\nUse C<< $x->{y} >> and B<bold I<text>>,\nsee L<the page|perlfoo> X<index>"
        "or 1 E<lt> 2.\n\n    code();\n\n=over\n\nMore.\n"
    )
    (found,) = read_pod("*.pod")(tmp_path)
    words = [" ".join(text.split()) for text in found]
    assert words == ["Use $x->{y} and bold text, see the page or 1 < 2.", "More."]


def test_restructured_text_loses_headings_directives_and_marks(tmp_path):
    (tmp_path / "a.rst.txt").write_text(
        "Title\n=====\n\nSee :ref:`the page <label>`, ``code`` and *stress*;\n`a link <x>`_ too::\n"
        "\n    code()\n\n.. note:: hidden\n\n- **An** item.\n\n:field: x\n"
    )
    (found,) = read_rst("*.rst.txt")(tmp_path)
    assert found == ["See the page, code and stress;\na link too:", "An item."]


def test_a_dictionary_is_read_by_its_index(tmp_path):
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    entries = [
        "info\n",
        "Apple\n  A {fruit}. [1913 Webster]\n\n  A tree.\n",
        "Bear\n  An animal.\n",
    ]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def base64(number):
        high, low = divmod(number, 64)
        return (digits[high] if high else "") + digits[low]

    lines, start = [], 0
    for word, entry in zip(["00databaseinfo", "apple", "bear"], entries, strict=True):
        lines.append(f"{word}\t{base64(start)}\t{base64(len(entry))}\n")
        start += len(entry)
    (folder / "d.dict.dz").write_bytes(gzip.compress("".join(entries).encode()))
    (folder / "d.index").write_text("".join(lines))
    (found,) = read_dictionary("d")(tmp_path)
    assert [text.split() for text in found] == [
        ["Apple", "A", "fruit."],
        ["A", "tree."],
        ["Bear", "An", "animal."],
    ]
    (folder / "d.index").write_text("apple A B\n")
    with pytest.raises(DataError, match=r"d\.index: not a line of an index: apple A B"):
        list(read_dictionary("d")(tmp_path))
    (folder / "d.dict.dz").write_bytes(gzip.compress(b"x" * 100)[:-9])
    with pytest.raises(DataError, match="cannot be decompressed"):
        list(read_dictionary("d")(tmp_path))


def test_wordnet_gives_words_and_their_explanation(tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    line = '00001740 03 n 02 physical_entity 0 thing 1 001 ~ 00001930 n 0000 | what exists; "x"  \n'
    for kind in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{kind}").write_text("  1 This software is licensed | so\n" + line)
    assert list(read_wordnet(tmp_path)) == [['physical entity, thing: what exists; "x".']] * 4
    (folder / "data.adv").write_text(line.replace("02 phys", "f2 phys"))
    with pytest.raises(DataError, match="data.adv: not a line of WordNet"):
        list(read_wordnet(tmp_path))


def test_fortunes_and_plain_text(tmp_path):
    folder = tmp_path / "usr/share/games/fortunes"
    folder.mkdir(parents=True)
    (folder / "wise").write_text("One.\n%\nTwo\nlines.\n%\n")
    (folder / "wise.dat").write_bytes(b"\0\xff")
    assert list(read_fortunes(tmp_path)) == [["One.\n", "Two\nlines.\n", ""]]
    (folder / "t.gz").write_bytes(gzip.compress(b"a\n\n  b\n"))
    assert list(read_text("usr/share/games/fortunes/*.gz")(tmp_path)) == [["a", "  b\n"]]


def test_a_file_that_swells_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        english_corpus, "_FILE", english_corpus.FileKind(error=DataError, advice="", max_bytes=5000)
    )
    (tmp_path / "t.gz").write_bytes(gzip.compress(b"a" * 100_000))
    with pytest.raises(DataError, match="holds more than"):
        list(read_text("*.gz")(tmp_path))


def test_a_package_without_text_is_an_error_and_nothing_is_left(tree, tmp_path):
    moved = Source("stories", "", "", read_html("usr/share/elsewhere/*.html"))
    with pytest.raises(DataError, match="stories gave no text"):
        made(tree, tmp_path / "out", sources=[moved])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        made(tree, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "roots"]
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def apt(tmp_path, tree, monkeypatch):
    """Put an apt-get on the path that has one package, built by dpkg-deb."""
    control = tree / "stories" / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        "Package: stories\nVersion: 1:2.0-3\nArchitecture: all\nMaintainer: n <n@example.org>\n"
        "Description: stories\n"
    )
    deb = tmp_path / "stories.deb"
    subprocess.run(["dpkg-deb", "--build", tree / "stories", deb], check=True, capture_output=True)
    shutil.rmtree(tree)
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "apt-get"
    script.write_text(
        f'#!/bin/sh\n[ "$2" = stories ] || {{ echo "E: no $2" >&2; exit 100; }}\n'
        f"cp {deb} stories_1%3a2.0-3_all.deb\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_packages_are_fetched_unpacked_and_noted(apt, tmp_path):
    for _ in range(2):  # the second time everything is there
        (package,) = fetch([STORIES], tmp_path / "debs")
        assert (package.version, package.architecture) == ("1:2.0-3", "all")
        assert package.size == package.file.stat().st_size and len(package.sha256) == 64
        (apt / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    assert len(list((tmp_path / "debs" / "stories" / "usr/share/doc/stories").iterdir())) == 10
    with pytest.raises(SetupError, match="apt-get download other failed"):
        fetch([Source("other", "", "", lambda root: iter([]))], tmp_path / "debs")


def test_a_machine_without_apt_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="apt-get is missing: .* Debian"):
        fetch([STORIES], tmp_path / "debs")


def test_the_command_builds_the_corpus_with_its_manifest(apt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(english_corpus, "SOURCES", (STORIES,))
    monkeypatch.chdir(tmp_path)
    assert main(["out", "--heldout", "0.3", "--only", "stories"]) == 0
    assert "train: {" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (row,) = manifest["packages"]
    assert row["licence"] == "MIT" and row["debs"][0]["version"] == "1:2.0-3"
    assert manifest["commands"][0] == "apt-get download stories"
    assert main(["out"]) == 5 and "already exists" in capsys.readouterr().err
    assert main(["new", "--only", "nothing"]) == 2
    assert main(["new", "--heldout", "1.5"]) == 2


def test_every_source_is_named_once():
    names = [source.package for source in SOURCES]
    assert len(names) == len(set(names)) and all(source.licence for source in SOURCES)
    assert debian_text.Source is Source
