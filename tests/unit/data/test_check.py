"""Corpora are looked at before anything starts."""

import json

import pytest

from megatron_hypenet.config.schema import SourceConfig
from megatron_hypenet.data import check
from megatron_hypenet.data.check import check_recall_lengths, check_source, refuse_large_text
from megatron_hypenet.data.token_writer import TokenFileWriter
from megatron_hypenet.errors import DataError
from tests.unit.halo.test_run_folder import STAGE, config

CHAT = json.dumps({"m": [{"role": "assistant", "content": "a"}]})


def source(path, **more):
    return SourceConfig(path=path, **more)


def test_whole_sources_pass(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n{"text": "a"}\n')
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.json").write_text(CHAT)
    assert check_source(source(tmp_path / "a.jsonl")) == 28
    assert check_source(source(tmp_path / "*.txt")) == 1
    assert check_source(source(tmp_path / "c.json", messages_key="m")) == len(CHAT)
    with TokenFileWriter(tmp_path / "pair", vocab_size=9) as writer:
        writer.add([1])
    assert check_source(source(tmp_path / "pair")) == 0
    # one empty file among others does no harm
    (tmp_path / "folder").mkdir()
    for name, content in (("a.jsonl", ""), ("b.jsonl", '{"text": "a"}')):
        (tmp_path / "folder" / name).write_text(content)
    assert check_source(source(tmp_path / "folder")) == 13


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("a.csv", "a,b", {}, "unknown kind of data"),
        ("a.jsonl", '{"body": "a"}', {}, "line 1: no text under 'text' .found: body"),
        ("a.jsonl", '{"text": "a"}', {"text_key": "body"}, "no text under 'body'"),
        ("a.jsonl", '{"text": "a"}', {"messages_key": "text"}, "not a list of messages"),
        ("a.txt", "a", {"messages_key": "m"}, "holds no conversations"),
        ("a.jsonl", "", {}, "holds no text"),
        ("a.parquet", "a", {}, "first bytes"),
    ],
)
def test_what_would_fail_later_fails_here(tmp_path, name, content, more, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        check_source(source(tmp_path / name, **more))


def test_large_text_is_refused_with_the_command_that_prepares_it(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(CHAT)
    (tmp_path / "b.txt").write_text("b")
    sources = [source(tmp_path / "a.jsonl", messages_key="m"), source(tmp_path / "b.txt")]
    refuse_large_text(sources, tmp_path)
    monkeypatch.setattr(check, "MOST_TEXT_BYTES", 20)
    with pytest.raises(DataError, match="GPUs would wait") as caught:
        refuse_large_text(sources, tmp_path / "T")
    assert str(caught.value).splitlines()[1:] == [
        f"  hypenet data prepare {tmp_path}/a.jsonl {tmp_path}/a.tokens --tokenizer {tmp_path}/T "
        "--messages-key m"
    ]
    (tmp_path / "b.txt").write_text("b" * 30)
    with pytest.raises(DataError, match=r"b.tokens --tokenizer"):
        refuse_large_text(sources, tmp_path / "T")


def test_recall_documents_that_no_tokenizer_could_write_are_refused(tmp_path):
    stage = {**STAGE, "seq_length": 32}
    sections = {name: stage for name in ("align", "distill", "finetune")}
    measured = {"recall_pairs": 4, "seq_length": 32, "length_multiples": [1, 2]}
    check_recall_lengths(config(tmp_path, **sections, eval=measured))
    data = {"train": ["a.txt"], "recall_fraction": 0.1, "recall_pairs": 5}
    run = config(
        tmp_path,
        **{**sections, "finetune": {**stage, "seq_length": 40}},
        data=data,
        eval={**measured, "recall_pairs": 8},
    )
    with pytest.raises(DataError) as caught:
        check_recall_lengths(run)
    says = "a recall document with 5 facts needs at least 40 tokens; seq_length is 32"
    assert [line.partition(". Use")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"  - align.seq_length=32: {says}",
        f"  - distill.seq_length=32: {says}",
        "  - eval.recall_pairs=8: a recall document with 8 facts needs at least 64 tokens; "
        "seq_length is 32",
    ]
