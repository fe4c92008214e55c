"""Batches of documents: whole, in order, the same from any place."""

import gzip
import json

import pytest
import zstandard

from megatron_hypenet.data import readers
from megatron_hypenet.data.readers import PIECE_CHARACTERS, parts_of, read_batches
from megatron_hypenet.data.records import documents_of
from megatron_hypenet.data.sources import find_files
from megatron_hypenet.errors import DataError

TEXTS = [f"text {number} \u00e9" + "x" * (number % 37) for number in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def documents(files, parts, begin=None):
    """Return (text, place after its batch) of everything that is read."""
    return [
        (text, batch.after)
        for batch in read_batches(files, parts, "text", begin)
        for _, text in documents_of(
            batch, str(files[batch.file].path), "text", chat=False, on_empty=print
        )
    ]


def texts(source, parts=None):
    files = find_files(source).files
    return [text for text, _ in documents(files, parts or parts_of(files, 0, 1))]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 700)


@pytest.fixture
def corpus(tmp_path):
    """Provide files of every kind that is no table."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(PACK[".gz"](LINES))
    (tmp_path / "c.json.zst").write_bytes(PACK[".zst"](LINES.rstrip(b"\n")))
    listed = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
    (tmp_path / "d.json").write_bytes(b" \n" + listed + b"\n")
    (tmp_path / "e.txt").write_text(("A line of prose.\r\n" * 400 + "\n") * 12)
    return tmp_path


def test_every_kind_gives_its_documents(corpus):
    found = texts(corpus)
    assert found[:800] == TEXTS * 4
    text = (corpus / "e.txt").read_bytes().decode().replace("\r\n", "\n")
    assert "".join(found[800:]) == text and len(found) == 805


def test_reading_goes_on_at_the_end_of_any_batch(corpus):
    files = find_files(corpus).files
    parts = parts_of(files, 0, 1)
    whole = documents(files, parts)
    for place in dict.fromkeys(after for _, after in whole):
        last = max(index for index, (_, after) in enumerate(whole) if after == place)
        assert documents(files, parts, place) == whole[last + 1 :]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_shares_have_every_document_once(corpus, count):
    files = find_files(corpus).files
    whole = texts(corpus)
    shares = [parts_of(files, number, count) for number in range(count)]
    assert [text for share in shares if share for text in texts(corpus, share)] == whole
    sizes = [part.stop - part.start for share in shares for part in share]
    assert sum(sizes) == sum(file.size for file in files)


def test_txt_is_cut_at_blank_lines_or_else_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 1 << 20)
    source = tmp_path / "a.txt"
    text = ("A line of prose that is long enough.\n" * 20 + "\n") * 60
    source.write_text(text)
    files = find_files(source).files
    (batch,) = read_batches(files, parts_of(files, 0, 1), "text")
    assert "".join(batch.content) == text and batch.ends
    assert all(PIECE_CHARACTERS <= len(part) < 2 * PIECE_CHARACTERS for part in batch.content[:-1])
    source.write_text("word " * 20 + "\n")
    assert len(texts(source)) == 1
    source.write_text(("word " * 20 + "\n") * 1000)
    assert len(texts(source)) > 2


def test_marks_line_ends_and_other_fields_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one", "x": NaN}\r\n\r\n'
        b'{"x": 1, "x": 2, "text": "\\ud83d\\ude00"}\r\n'
    )
    assert texts(tmp_path / "a.jsonl") == ["one", "\U0001f600"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n"]
    for content in (b"\xef\xbb\xbf[]", b" [ ] "):
        (tmp_path / "a.json").write_bytes(content)
        assert texts(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text"]', "row 2: not JSON"),
        (b'[{"text": "a"},]', "row 2: not JSON"),
        (b'[{"text": "a"} {"text": "b"}]', "row 2: not JSON: '{' in the place of ','"),
        (b'[{"text": "a"}, ', "row 2: not JSON: the list is not closed"),
        (b'[{"text": "a"}', "row 2: not JSON: the list is not closed"),
        (b"[", "row 1: not JSON"),
        (b'[{"text": "a"}] {}', "not JSON: '{}' follows the list"),
        (b'[{"text": "a"}, 5]', "row 2: no text under 'text' .found: int"),
        (b'[{"text": "\xff"}]', "row 1: not JSON: not UTF-8 text: a byte 0xff"),
        (b'{"text": "a"}\n{\n', "line 2: not JSON"),
        (b'{"n": %s}' % (b"9" * 5000), "line 1: not JSON: .* 5000 digits; a .jsonl"),
        (b'[{"n": %s}]' % (b"9" * 5000), "row 1: not JSON: .* 5000 digits; a .json"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.json")


def test_long_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * (3 << 20))
    with pytest.raises(DataError, match="line 2: longer than 1 MiB"):
        texts(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"a\n" + b"x" * (3 << 20))
    with pytest.raises(DataError, match="line 2: longer than 1 MiB; break the text into lines"):
        texts(tmp_path / "a.txt")


def test_a_member_that_is_not_closed_is_not_read_over_and_over(tmp_path, monkeypatch):
    asked = []
    more = readers._more
    monkeypatch.setattr(readers, "BATCH_BYTES", 1 << 10)
    monkeypatch.setattr(readers, "_more", lambda *args: asked.append(args[3]) or more(*args))
    (tmp_path / "a.json").write_bytes(b'[{"text": "a", "n": [' + b"1, " * (1 << 17))
    with pytest.raises(DataError, match="row 1: not JSON"):
        texts(tmp_path / "a.json")
    assert len(asked) < 14
