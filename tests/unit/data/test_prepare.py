import gzip
import json

import pytest

from megatron_hypenet.data import prepare as module
from megatron_hypenet.data import readers
from megatron_hypenet.data.indexed import open_tokens
from megatron_hypenet.data.journal import working_folder
from megatron_hypenet.data.pairs import mask_path, token_paths
from megatron_hypenet.data.places import Fields
from megatron_hypenet.data.prepare import (
    CorpusJob,
    merge_files,
    prepare_corpus_files,
    prepare_file,
)
from megatron_hypenet.data.tokenizer import encode, load_tokenizer
from megatron_hypenet.errors import DataError, SetupError, UsageError


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


def test_txt_ends_once(tmp_path, tokenizer):
    source = tmp_path / "a.txt"
    source.write_text(("A line of prose that is long enough.\n" * 20 + "\n") * 60)
    prepare_file(source, tmp_path / "a", tokenizer)
    tokens = open_tokens(tmp_path / "a").tokens
    assert tokens[-1] == 0 and (tokens == 0).sum() == 1


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


CHAT_TEMPLATE = """{%- for m in messages %}{{ '<|endoftext|>' + m.role + ' ' + m.content }}
{%- endfor %}<|endoftext|>{%- if add_generation_prompt %}{{ 'assistant ' }}{%- endif %}"""


@pytest.fixture
def corpus(tmp_path):
    """Make a folder of three files; batches are small, and every one is noted in the journal."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(json.dumps({"text": f"Text {n}. " * (1 + n % 7)}) + "\n" for n in range(300))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": ""}\n' + lines.encode()))
    (folder / "c.txt").write_text(("A line of prose.\n" * 400 + "\n") * 12)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)


def job(tokenizer, source, out, **changes):
    given = {"tokenizer_files": [], "fields": Fields(), "end": 0, "vocab_size": 2048, "workers": 0}
    return CorpusJob(source=source, out=out, tokenizer=tokenizer, **{**given, **changes})


def prepared(*args, overwrite=False, on_progress=lambda progress: None, **changes):
    return prepare_corpus_files(job(*args, **changes), overwrite=overwrite, on_progress=on_progress)


def content(prefix):
    return [path.read_bytes() for path in token_paths(prefix)]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer, corpus):
    prepare_file(corpus, tmp_path / "whole", tokenizer)
    seen = []
    for workers in (0, 1, 2):
        counts = prepared(
            tokenizer, corpus, tmp_path / "out", workers=workers, on_progress=seen.append
        )
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        assert not working_folder(tmp_path / "out").exists()
    assert "(b.jsonl.gz line 1)" in counts.note and counts.answers is None
    assert counts.documents == len(open_tokens(tmp_path / "whole").document_ends)
    assert seen[-1].read_bytes == seen[-1].total_bytes and seen[-1].tokens == counts.tokens
    assert all(0 < progress.read_bytes <= progress.total_bytes for progress in seen)


class Stop(Exception):
    pass


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_same_command_goes_on_where_it_was_stopped(tmp_path, tokenizer, corpus, share):
    batches = []
    prepare_file(corpus, tmp_path / "whole", tokenizer, on_documents=batches.append)
    after = max(1, round(share * len(batches)))
    counts = []

    def stop(progress):
        counts.append(progress)
        if len(counts) == after:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        prepared(tokenizer, corpus, out, on_progress=stop)
    with (working_folder(out) / "tokens").open("ab") as stream:
        stream.write(b"what was written behind the last note")
    rest = []
    made = prepared(tokenizer, corpus, out, on_progress=rest.append)
    assert content(out) == content(tmp_path / "whole")
    assert "1 documents have an empty text" in made.note
    assert len(rest) == len(batches) - after
    assert all(progress.bytes_before > 0 for progress in rest)


def test_a_command_that_was_stopped_at_the_very_end(tmp_path, tokenizer, corpus, monkeypatch):
    out = tmp_path / "out"

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "move_into_place", stop)
        with pytest.raises(Stop):
            prepared(tokenizer, corpus, out)
    counts = prepared(tokenizer, corpus, out)
    assert counts.tokens == len(open_tokens(out).tokens) and counts.documents > 600


def test_other_commands_do_not_go_on_with_it(tmp_path, tokenizer, corpus):
    out = tmp_path / "out"

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        prepared(tokenizer, corpus, out, on_progress=stop)
    with pytest.raises(UsageError, match="another end token"):
        prepared(tokenizer, corpus, out, end=1)
    assert prepared(tokenizer, corpus, out, end=1, overwrite=True).tokens
    assert (open_tokens(out).tokens == 0).sum() == 0


def test_bad_input_leaves_nothing_and_a_full_disk_can_be_mended(
    tmp_path, tokenizer, corpus, monkeypatch
):
    out = tmp_path / "out"

    def full(progress):
        raise OSError(28, "No space left on device")

    with pytest.raises(SetupError, match="free space, and give the same command again"):
        prepared(tokenizer, corpus, out, on_progress=full)
    assert working_folder(out).exists()
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match="a.jsonl, line 301: not JSON"):
        prepared(tokenizer, corpus, out, overwrite=True)
    assert not working_folder(out).exists() and not list(tmp_path.glob("out*"))


def test_shares_joined_are_the_whole(tmp_path, tokenizer, corpus):
    prepare_file(corpus, tmp_path / "whole", tokenizer)
    names = [tmp_path / f"part{number}" for number in range(5)]
    for number, name in enumerate(names):
        prepared(tokenizer, corpus, name, part=(number, 5))
    merge_files(names, tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "whole")
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match="a.jsonl, line 301: not JSON"):
        for number in range(5):
            prepared(tokenizer, corpus, tmp_path / "again", part=(number, 5), overwrite=True)


def test_conversations_get_a_mask(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"m": chat}) + "\n" for _ in range(3)))
    try:
        counts = prepare_file(source, tmp_path / "a", tokenizer, messages_key="m")
        made = prepared(tokenizer, source, tmp_path / "b", fields=Fields(messages_key="m"))
        # the same prefix without conversations has no mask
        (tmp_path / "t.txt").write_text("text")
        prepared(tokenizer, tmp_path / "t.txt", tmp_path / "b2")
    finally:
        tokenizer.chat_template = None
    opened = open_tokens(tmp_path / "a")
    answer = tokenizer.decode(opened.tokens[opened.mask != 0])
    assert answer == " Hello there<|endoftext|>" * 3
    assert counts.answers == made.answers == int(opened.mask.sum())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert mask_path(tmp_path / "a").read_bytes() == mask_path(tmp_path / "b").read_bytes()
    merge_files([tmp_path / "b2", tmp_path / "a"], tmp_path / "joined")
    plain = len(open_tokens(tmp_path / "b2").tokens)
    joined = open_tokens(tmp_path / "joined")
    assert joined.mask.tolist() == [1] * plain + opened.mask.tolist()
