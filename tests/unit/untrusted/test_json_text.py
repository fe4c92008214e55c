import time
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import parse_json, read_object, read_typed, typed

KIND = FileKind(error=CheckpointError, advice="use another one")


@dataclass(frozen=True)
class Form:
    name: str
    steps: int = 0
    rates: tuple[float, ...] = ()
    extra: dict[str, Any] | None = None


def test_plain_json_is_returned_as_python_has_it():
    text = (
        '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00 ]["], "b": {"c": '
        "1000000000000000019884624838656}}"
    )
    assert parse_json(KIND, "x.json", text) == {
        "a": [1, -2500.0, True, None, "😀 ]["],
        "b": {"c": 1000000000000000019884624838656},
    }


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "beyond what a float holds"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is written twice"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ("[" * 3000 + "]" * 3000, "nested more than 64 levels"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 64 levels"),
        ("[" * 100, "nested more than 64 levels"),
    ],
)
def test_what_json_leaves_open_or_bounds_forbid_is_refused(text, word):
    with pytest.raises(CheckpointError) as caught:
        parse_json(KIND, "x.json", text)
    assert word in str(caught.value)
    assert str(caught.value).startswith("x.json: ")
    assert str(caught.value).endswith("; use another one")
    assert len(str(caught.value)) < 300


def test_many_small_values_are_refused_before_they_take_memory():
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="more than 2,000,000 values"):
        parse_json(KIND, "x.json", "[" + "[]," * 5_000_000 + "0]")
    assert time.perf_counter() - started < 10


def test_marks_inside_of_strings_do_not_count():
    kind = FileKind(error=CheckpointError, advice="-", max_values=10, max_depth=2)
    assert parse_json(kind, "x", '["' + ",[{:" * 50 + '\\"[[["]') == [",[{:" * 50 + '"[[[']


def test_an_object_is_expected_at_the_top(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected an object at the top, got list"):
        read_object(KIND, tmp_path / "x.json")


def test_typed_values_are_strict(tmp_path):
    (tmp_path / "x.json").write_text(
        '{"name": "a", "steps": 3, "rates": [1, 2.5], "extra": {"k": [1]}}'
    )
    assert read_typed(KIND, tmp_path / "x.json", Form) == Form("a", 3, (1.0, 2.5), {"k": [1]})
    for value, word in [
        ({}, "name: missing"),
        ({"name": 3}, "name: should be a valid string, got 3"),
        ({"name": "a", "steps": 3.0}, "steps: should be a valid integer"),
        ({"name": "a", "steps": "3"}, "steps: "),
        ({"name": "a", "steps": True}, "steps: "),
        ({"name": "a", "rates": 5}, "rates: "),
        ({"name": "a", "rates": {"x": 1}}, "rates: "),
        ({"name": [["a"]]}, "name: "),
        ([], "the top: should be an object"),
    ]:
        with pytest.raises(CheckpointError, match=word):
            typed(KIND, "x.json", value, Form)
    with pytest.raises(CheckpointError, match="and 1 more"):
        typed(KIND, "x.json", {"name": 1, "steps": "a", "rates": 1, "extra": 1}, Form)
