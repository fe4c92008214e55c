"""Values of records, checked; defects name the line or the row."""

import json

import pytest

from megatron_hypenet.data.places import RecordError
from megatron_hypenet.data.readers import Batch, Place
from megatron_hypenet.data.records import documents_of

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def found(content, form="rows", file="a.parquet", chat=False, key="text"):
    empty = []
    batch = Batch(0, 5, form, content, Place(), 0)
    rows = list(documents_of(batch, file, key, chat=chat, on_empty=empty.append))
    return [(str(where), value) for where, value in rows], empty


def test_texts_of_lines_rows_and_pieces():
    lines = b'{"text": "a"}\n\n{"text": ""}\n{"text": "b"}'
    assert found(lines, "lines", "x.jsonl") == (
        [("x.jsonl, line 5", "a"), ("x.jsonl, line 8", "b")],
        [7],
    )
    assert found(["a", "", "b"]) == ([("a.parquet, row 5", "a"), ("a.parquet, row 7", "b")], [6])
    assert found(['{"text": "a"}'], file="a.json") == ([("a.json, row 5", "a")], [])
    where = "a.txt, line 5"
    assert found(["one", ""], "pieces", "a.txt")[0] == [(where, "one"), (where, "")]


def test_conversations():
    table = [{**message, "name": None} for message in CHAT]
    assert found([table, []], chat=True, key="m") == ([("a.parquet, row 5", CHAT)], [6])
    line = json.dumps({"m": CHAT}).encode()
    assert found(line, "lines", "x.jsonl", chat=True, key="m")[0] == [("x.jsonl, line 5", CHAT)]
    call = [{"role": "assistant", "tool_calls": [{"name": "f"}]}]
    assert found([call], chat=True)[0][0][1] == call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "row 5: str, not a list of messages, under 'text'"),
        ([{"content": "a"}], "row 5: message 1 under 'text' has no role"),
        ([*CHAT, "x"], "row 5: message 3 under 'text' has no role"),
        ([{"role": "user"}], "row 5: message 1 under 'text' has no content"),
        ([{"role": "user", "content": [1]}], "has a content of list; give it as text"),
        ([{"role": "user", "content": "\ud83d"}], r"holds .ud83d, half of a surrogate"),
    ],
)
def test_bad_conversations(value, message):
    with pytest.raises(RecordError, match=message):
        found([value], chat=True)


@pytest.mark.parametrize("value", [None, 5, b"bytes", ["a"]])
def test_values_of_a_table_that_are_no_text(value):
    with pytest.raises(RecordError, match="row 6: .*, not text, under 'text'"):
        found(["a", value])
