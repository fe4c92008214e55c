import json

import pytest

from megatron_hypenet.data.indexed import open_tokens
from megatron_hypenet.data.prepare import (
    PIECE_CHARACTERS,
    merge_files,
    prepare_file,
    read_documents,
)
from megatron_hypenet.data.tokenizer import encode, load_tokenizer
from megatron_hypenet.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(repo_root):
    return load_tokenizer(repo_root / "assets" / "tiny-qwen3")


def test_jsonl_documents_end_with_the_end_id(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text(
        "\n".join(json.dumps({"body": text}) for text in ("One sentence.", "", "Another one."))
        + "\n\n"
    )
    heard = []
    counts = prepare_file(
        source, tmp_path / "a", tokenizer, text_key="body", on_documents=heard.append
    )
    opened = open_tokens(tmp_path / "a")
    assert opened.tokens.tolist() == [
        *encode(tokenizer, "One sentence."),
        0,
        *encode(tokenizer, "Another one."),
        0,
    ]
    assert (
        counts.documents == 2 == len(opened.document_ends)
        and counts.tokens == len(opened.tokens)
        and heard == [2]
    )


def test_txt_is_cut_into_pieces_and_ends_once(tmp_path, tokenizer):
    source = tmp_path / "a.txt"
    text = ("A line of prose that is long enough.\n" * 20 + "\n") * 60
    source.write_text(text)
    pieces = list(read_documents(source))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(PIECE_CHARACTERS <= len(piece) < 2 * PIECE_CHARACTERS for piece, _ in pieces[:-1])
    prepare_file(source, tmp_path / "a", tokenizer)
    tokens = open_tokens(tmp_path / "a").tokens
    assert tokens[-1] == 0 and (tokens == 0).sum() == 1


def test_txt_without_blank_lines_is_cut_too(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("word " * 20 + "\n" * 1)
    assert len(list(read_documents(source))) == 1
    source.write_text(("word " * 20 + "\n") * 1000)
    assert len(list(read_documents(source))) > 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("a.csv", b"x", "unknown kind of data '.csv'"),
        ("empty.txt", b"", "holds no text"),
        ("empty.jsonl", b"\n\n", "holds no text"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("key.jsonl", b'{"content": "a"}', "no text under 'text' .found: content."),
        ("list.jsonl", b"[1]", "no text under 'text' .found: list."),
        (
            "latin.txt",
            b"a\n\xe9t\xe9",
            "latin.txt, line 2: not UTF-8 text: byte 1 of the line is 0xe9",
        ),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2: not UTF-8 text"),
        (
            "cut.jsonl",
            b'{"text": "a"}\n{"text": "b \\ud83d c"}\n',
            r"cut.jsonl, line 2: the text holds .ud83d.*at character 2",
        ),
        ("low.jsonl", b'{"text": "\\udc00"}', "line 1: the text holds .udc00"),
        ("number.jsonl", b'{"text": 5}', "line 1: int, not text, under 'text'"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}', "line 2: NoneType, not text"),
        ("twice.jsonl", b'{"text": "a", "text": "b"}', "'text' is written twice"),
        ("nul.jsonl", b'{"text": "a\0b"}', "line 1: not JSON"),
        ("nul.txt", b"a\nb\0c", "nul.txt, line 2: holds a NUL character"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("digits.jsonl", b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "line 1: not JSON"),
        ("packed.jsonl", b"\x1f\x8b\x08\0", "not text but a gzip file"),
        ("packed.txt", b"\x28\xb5\x2f\xfd", "not text but a zstd file"),
        ("table.jsonl", b"PAR1x", "a Parquet file"),
        ("wide.txt", b"\xff\xfea\0", "UTF-16 text; convert it first"),
        ("all_empty.jsonl", b'{"text": ""}', "holds no text"),
    ],
)
def test_bad_sources(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_file(tmp_path / name, tmp_path / "out", tokenizer)
    assert not list(tmp_path.glob("*out*"))


def test_foreign_tokenizer(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the function returned")
    with pytest.raises(DataError, match="the model's vocabulary has 300 entries"):
        prepare_file(tmp_path / "a.txt", tmp_path / "a", tokenizer, vocab_size=300)


def test_merge(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"Text {name}.")
        prepare_file(tmp_path / f"{name}.txt", tmp_path / name, tokenizer)
    counts = merge_files([tmp_path / "b", tmp_path / "a"], tmp_path / "both")
    both, a, b = (open_tokens(tmp_path / name) for name in ("both", "a", "b"))
    assert (
        both.tokens.tolist() == b.tokens.tolist() + a.tokens.tolist()
        and both.tokens.dtype == a.tokens.dtype
    )
    assert counts.documents == 2 and both.document_ends.tolist() == [len(b.tokens), counts.tokens]
    prepare_file(tmp_path / "a.txt", tmp_path / "wide", tokenizer, vocab_size=100_000)
    with pytest.raises(DataError, match="different id types"):
        merge_files([tmp_path / "a", tmp_path / "wide"], tmp_path / "no")


def test_marks_line_ends_and_other_fields_do_no_harm(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one", "x": NaN}\r\n\r\n'
        b'{"x": 1, "x": 2, "text": "\\ud83d\\ude00"}\r\n'
    )
    assert [text for text, _ in read_documents(tmp_path / "a.jsonl")] == ["one", "\U0001f600"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(read_documents(tmp_path / "a.txt")) == [("one\ntwo\n", True)]


def test_empty_texts_are_left_out_and_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "a"}', *['{"text": ""}'] * 7]))
    counts = prepare_file(tmp_path / "a.jsonl", tmp_path / "a", tokenizer)
    assert (
        counts.documents == 1
        and "7 documents have an empty text and are left out (line 2, 3, 4, 5, 6, ...)"
        in counts.note
    )


def test_the_end_token_may_be_another_than_the_tokenizers(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    prepare_file(tmp_path / "a.jsonl", tmp_path / "a", tokenizer, end=9)
    assert open_tokens(tmp_path / "a").tokens[-1] == 9
