import json

import pytest

from megatron_hypenet.data.indexed import open_tokens
from megatron_hypenet.data.prepare import PIECE_CHARACTERS, merge_files, prepare_file, read_documents
from megatron_hypenet.data.tokenizer import encode, load_tokenizer
from megatron_hypenet.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(repo_root):
    return load_tokenizer(repo_root / "assets" / "tiny-qwen3")


def test_jsonl_documents_end_with_the_end_id(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"body": text}) for text in ("One sentence.", "", "Another one.")) + "\n\n")
    heard = []
    counts = prepare_file(source, tmp_path / "a", tokenizer, text_key="body", on_documents=heard.append)
    opened = open_tokens(tmp_path / "a")
    assert opened.tokens.tolist() == [*encode(tokenizer, "One sentence."), 0, *encode(tokenizer, "Another one."), 0]
    assert counts.documents == 2 == len(opened.document_ends) and counts.tokens == len(opened.tokens) and heard == [2]


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
        ("latin.txt", b"\xe9t\xe9", "not UTF-8"),
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
    assert both.tokens.tolist() == b.tokens.tolist() + a.tokens.tolist() and both.tokens.dtype == a.tokens.dtype
    assert counts.documents == 2 and both.document_ends.tolist() == [len(b.tokens), counts.tokens]
    prepare_file(tmp_path / "a.txt", tmp_path / "wide", tokenizer, vocab_size=100_000)
    with pytest.raises(DataError, match="different id types"):
        merge_files([tmp_path / "a", tmp_path / "wide"], tmp_path / "no")
