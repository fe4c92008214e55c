import os
import re
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.yaml_text import Plain, parse_yaml, read_yaml, value_of

KIND = FileKind(
    error=ConfigError, advice="mend it", max_bytes=100_000, max_values=1000, max_depth=10
)


def parsed(text):
    return value_of(parse_yaml(KIND, "x.yaml", text))


def refused(text, *words):
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(KIND, "x.yaml", text)
    assert time.monotonic() - started < 5
    for word in ("x.yaml: ", *words, "mend it"):
        assert word in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("+4", 4), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), ("0", 0),
        ("1e5", 1e5), ("3e-4", 3e-4), (".5", 0.5), ("12.10", 12.1), ("1.", 1.0),
        ("-1.5E+3", -1500.0), ("1_000.5", 1000.5),
        ("true", True), ("Yes", True), ("ON", True), ("off", False), ("No", False),
        ("null", None), ("~", None), ("", None),
        ("1:30", "1:30"), ("4:00:00", "4:00:00"), ("0755", "0755"), ("-017", "-017"),
        ("2024-01-01", "2024-01-01"), ("e5", "e5"),
        ("1e5x", "1e5x"), ("1__0", "1__0"), ("y", "y"), ("0o17", "0o17"), ("0x", "0x"),
        ("9" * 5000, "9" * 5000),
        ("'12'", "12"), ('"yes"', "yes"), ("!!str 12", "12"), ("! 12", "12"), ("!!float 12", 12),
    ],
)  # fmt: skip
def test_scalars_look_like_what_a_person_means(text, value):
    found = parsed(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


def test_scalars_keep_their_text_and_whether_they_had_quotes():
    found = parse_yaml(
        KIND,
        "x",
        "{a: 012.10, b: '1', on: ~, 1.50: x, c: |\n  7\n}".replace("{", "")
        .replace("}", "")
        .replace(", ", "\n"),
    )
    assert found == {"a": "012.10", "b": "1", "on": "~", "1.50": "x", "c": "7\n"}
    assert [isinstance(found[key], Plain) for key in ("a", "b", "on", "1.50", "c")] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert all(type(key) is str for key in found)


def test_infinities_are_floats():
    assert (
        parsed("[.inf, -.INF]") == [float("inf"), float("-inf")]
        and parsed("[.nan]")[0] != parsed("[.nan]")[0]
    )


MERGES = [
    ("{<<: *s, y: 9}", {"x": 1, "y": 9}),
    ("{y: 9, <<: *s}", {"x": 1, "y": 9}),
    ("{<<: [*s, *t]}", {"x": 1, "y": 2, "z": 4}),
    ("{<<: [*t, *s], z: 0}", {"x": 3, "y": 2, "z": 0}),
    ("{<<: {x: 5, w: 6}, x: 7}", {"x": 7, "w": 6}),
    ("{'<<': 1}", {"<<": 1}),
    ("{<<: *u, x: 8}", {"x": 8, "y": 2}),
]


@pytest.mark.parametrize(("text", "value"), MERGES)
def test_merge_keys_bring_values_under_the_written_ones(text, value):
    text = f"s: &s {{x: 1, y: 2}}\nt: &t {{x: 3, z: 4}}\nu: &u {{<<: *s}}\nr: {text}\n"
    assert parsed(text)["r"] == value == yaml.safe_load(text)["r"]


@pytest.mark.parametrize("merge", ["<<: 1", "<<: [1]", "<<: []", "<<:", "<<: [[*s]]"])
def test_a_merge_key_takes_mappings_only(merge):
    refused(f"s: &s {{x: 1}}\nr: {{{merge}}}\n", "the merge key << takes a mapping")


LISTS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join(['*' + o] * 9)}]\n" for o, n in zip("abcdefgh", "bcdefghi", strict=True)
)
MAPS = "a: &a {x: 1}\n" + "".join(
    f"{n}: &{n} {{{','.join(f'k{i}: *{o}' for i in range(9))}}}\n"
    for o, n in zip("abcdefgh", "bcdefghi", strict=True)
)
BILLION_MERGES = "a: &a {x: 1}\n" + "".join(
    f"{n}: &{n} {{<<: [{','.join(['*' + o] * 9)}]}}\n"
    for o, n in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LISTS, ["holds more than 1,000 values, aliases counted in full"]),
        (MAPS, ["holds more than 1,000 values"]),
        (BILLION_MERGES, ["holds more than 1,000 values"]),
        ("[" * 3000, ["nested more than 10 levels"]),
        ("{a: " * 3000, ["nested more than 10 levels"]),
        ("- " * 3000, ["nested more than 10 levels"]),
        ("? " * 3000, ["a mapping as a key"]),
        ("a: &a [[[[[1]]]]]\nb: [[[[[[*a]]]]]]\n", ["nested more than 10 levels"]),
        ("[" + "x," * 20_000 + "]", ["holds more than 1,000 values"]),
        ("&a {a: *a}", ["line 1: the alias *a stands inside its own anchor"]),
        ("&a [*a]", ["inside its own anchor"]),
        ("*a", ["an anchor that is not defined"]),
        ("[&a 1, &a 2]", ["&a is defined twice"]),
        ("? [1,2]\n: 1", ["a list or a mapping as a key"]),
        ("? {a: 1}\n: 1", ["a list or a mapping as a key"]),
        ("x: &a [1]\n*a : 2", ["a list or a mapping as a key"]),
        ("x: 1\ny: 2\nx: 3\n", ["line 3: the key 'x' is written twice"]),
        ("x: 1\n'x': 3\n", ["'x' is written twice"]),
        ("s: &s {}\nr: {<<: *s, <<: *s}", ["'<<' is written twice"]),
        ("a: 1\n---\nb: 2\n", ["a second document"]),
        ("a: [1\n", ["not valid YAML (line 2", "column"]),
        ("a: 1\n\tb: 2\n", ["not valid YAML (line 2"]),
        (
            "a: !!python/object/apply:os.system ['true']",
            ["the tag !!python/object/apply:os.system"],
        ),
        (
            "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x",
            ["the tag !!python/name:os.system"],
        ),
        ("a: !!set {x}", ["the tag !!set"]),
        ("a: !!binary aGk=", ["the tag !!binary"]),
        ("a: !!timestamp 2024-01-01", ["the tag !!timestamp"]),
        ("a: !!omap [x: 1]", ["the tag !!omap"]),
        ("a: !mine 1", ["the tag !mine"]),
        ('a: "x\\0y"', ["'\\x00'"]),
        ('a: "\\ud83d"', ["'\\ud83d'"]),
        ('a: "\\U00110000"', ["not valid YAML"]),
        ("a: \x07", ["not valid YAML"]),
    ],
)
def test_hostile_and_damaged_text_is_refused_at_once(text, words):
    refused(text, *words)


def test_aliases_within_the_limits_stand_for_their_value():
    assert parsed("a: &a [1, &b x]\nc: *a\nd: {*b : *b}\n") == {
        "a": [1, "x"],
        "c": [1, "x"],
        "d": {"x": "x"},
    }


def test_files_are_read_within_limits(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffa: ä\n".encode())
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "large").write_text("a: " + "x" * 200_000)
    os.mkfifo(tmp_path / "pipe")
    assert (
        read_yaml(KIND, tmp_path / "a.yaml") == {"a": "ä"}
        and read_yaml(KIND, tmp_path / "empty") is None
    )
    for name, says in [
        ("large", "larger than"),
        ("pipe", "not a regular file"),
        ("", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=says):
            read_yaml(KIND, tmp_path / name)


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**9), 10**9),
        st.floats(allow_nan=False),
        # not U+0085: what PyYAML writes for it with allow_unicode, PyYAML itself reads as something
        # else
        st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=8).filter(
            # PyYAML writes it without quotes, and it is a number here as in YAML 1.2
            lambda text: not re.fullmatch(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+", text, re.ASCII)
        ),
    ),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.text("abc:#~!", min_size=1, max_size=4), below, max_size=3)
    ),
    max_leaves=8,
)


@given(value=VALUES)
def test_what_pyyaml_writes_reads_back(value):
    written = yaml.safe_dump({"key": value}, allow_unicode=True)
    try:
        assert parsed(written) == {"key": value}
    except ConfigError as error:
        assert "\\x00" in str(error)


@given(text=st.text("ab:-[]{}&*!?<|>'\"# \n,~1.\\", max_size=40))
def test_any_text_is_a_value_or_one_error(text):
    try:
        parsed(text)
    except ConfigError as error:
        assert "x.yaml" in str(error)
