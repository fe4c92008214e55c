from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from megatron_hypenet.config.meaning import (
    as_meant,
    from_word,
    hint,
    holds_items,
    holds_settings,
    item,
    member,
    scalar_kinds,
)
from megatron_hypenet.config.schema import DataConfig, ParallelConfig, RunConfig
from megatron_hypenet.errors import ConfigError
from megatron_hypenet.untrusted.yaml_text import Plain

WHOLE = Annotated[int, Field(ge=0)]


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("12.10", str, "12.10"), ("0755", str | None, "0755"), ("yes", str, "yes"),
        ("1e3", Path, "1e3"), ("null", str | None, None),
        ("12.10", float, 12.1), ("1_000", WHOLE, 1000), ("0x1F", int | None, 31),
        ("yes", bool, True), ("1", float, 1),
        ("none", Literal["none", "full"], "none"), ("2", Literal[0, 1, 2], 2),
        ("3", str | float | None, 3), ("hype", str | float, "hype"),
        ("7", Any, 7), ("off", Any, False),
    ],
)  # fmt: skip
def test_the_type_of_a_setting_decides(text, annotation, value):
    found = as_meant(Plain(text), annotation)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("1e3", int),
        ("1.0", int),
        ("true", int),
        ("1", bool),
        ("true", float),
        ("0755", int),
        ("1:30", float),
        ("x", int),
        ("true", Literal[1]),
    ],
)
def test_what_does_not_fit_stays_as_written(text, annotation):
    assert isinstance(as_meant(Plain(text), annotation), Plain)


def test_quotes_make_text_but_for_numbers_with_a_point():
    assert (
        as_meant("3e-4", float | None) == 3e-4
        and as_meant("12", int) == "12"
        and as_meant("yes", bool) == "yes"
    )
    assert as_meant("x", float) == "x"


def test_lists_and_sections_follow_their_types():
    given = {
        "data": {"train": [Plain("0755"), Plain("a")], "seed": Plain("0755")},
        "align": {"adam_betas": [Plain("1"), Plain(".5")]},
    }
    found = as_meant(given, RunConfig)
    assert found == {
        "data": {"train": ["0755", "a"], "seed": "0755"},
        "align": {"adam_betas": [1, 0.5]},
    }
    assert (
        isinstance(found["data"]["seed"], Plain)
        and found["data"]["train"] is not given["data"]["train"]
    )
    assert as_meant({"x": {"y": Plain("on")}}, dict[str, str]) == {"x": {"y": True}}
    assert as_meant({"x": Plain("on")}, dict[str, str]) == {"x": "on"}


def test_types_are_looked_into():
    assert (
        member(RunConfig, "data") is DataConfig
        and member(RunConfig, "nothing") is Any
        and member(dict[str, int], "x") is int
    )
    assert (
        member(DataConfig | None, "seed") is int
        and item(tuple[int, ...], 5) is int
        and item(tuple[int, str], 1) is str
    )
    assert item(tuple[int, str], 2) is Any and item(int, 0) is Any
    assert (
        holds_settings(DataConfig)
        and not holds_settings(int)
        and holds_items(ParallelConfig.model_fields["pipeline_layout"].annotation)
    )
    assert scalar_kinds(Annotated[int | None, Field()]) == {
        "int",
        "null",
    } and "path" in scalar_kinds(Path)


@pytest.mark.parametrize(
    "text",
    [
        "my#file.txt",
        "runs/a #b",
        "a: b",
        "[x",
        "{x}",
        "*x",
        "&x",
        "!x",
        "%x",
        "@x",
        "a=b",
        "it's",
        'a"b"',
        "- a",
        "x,y",
        "`x`",
        "|",
        ">",
    ],
)
def test_a_path_on_the_command_line_is_its_text(text):
    assert as_meant(from_word(text, Path), Path) == text
    assert as_meant(from_word(text, tuple[Path, ...]), Path) == text


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("~", Path, "~"), ("null", Path | None, None), ("12.10", str, "12.10"),
        ('"4:00"', str, "4:00"), ("'x'", str, "x"), ('""', str, ""),
        (" 3e-4 ", float, 3e-4), ("[1, 2]", tuple[int, ...], [1, 2]),
        ("[a, 'b #c']", tuple[Path, ...], ["a", "b #c"]),
        ("{lr: 1}", ParallelConfig, {"lr": 1}), ("lr: 1", ParallelConfig, {"lr": 1}),
        ("null", tuple[int, ...] | None, None),
    ],
)  # fmt: skip
def test_other_words_are_read_by_their_type(text, annotation, value):
    assert as_meant(from_word(text, annotation), annotation) == value


@pytest.mark.parametrize(
    ("text", "annotation", "says"),
    [
        ("", Path, "the value is empty; write null"), ("  ", int, "the value is empty"),
        ("=x", Path, "two equals signs"),
        (" x", Path, "begins or ends with a space"), ("x ", str, "begins or ends with a space"),
        ("a\nb", Path, "line break"),
        ("'x'", Path, "would have quotes in its name"),
        ("[1, 2 #3\n]", tuple[int, ...], "cannot be printed"),
        ("[1] #]", tuple[int, ...], "for a comment"),
    ],
)  # fmt: skip
def test_words_with_two_meanings_are_refused(text, annotation, says):
    with pytest.raises(ValueError, match=r".") as caught:
        from_word(text, annotation)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 3000 + "]", "[1", "[a: [}]", "[*a]"])
def test_broken_and_deep_lists_are_refused(text):
    with pytest.raises(ConfigError, match="CLI: here: "):
        from_word(text, ParallelConfig, "CLI: here")


def test_traps_get_a_hint():
    assert "base 60" in hint("1:30", wanted="integer") and "octal" in hint("0755", wanted="number")
    assert (
        hint("1e3", wanted="integer") == "; write 1000 if that is meant"
        and hint("1e3", wanted="number") == hint("x", wanted="integer") == ""
    )
