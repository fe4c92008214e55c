"""A pickle is read as inert values: nothing is called, nothing is hashed, and a damaged one ends in
one error."""

import pickle
import random
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.pickles import Collection, Global, Pairs, Record, read_pickle

KIND = FileKind(error=CheckpointError, advice="use another one")
# t = (t, t), sixty times
DOUBLED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))


@dataclass
class Point:
    """What a data class looks like in a pickle."""

    x: int
    y: object


def read(payload):
    return read_pickle(
        KIND,
        Path("some.pkl"),
        payload,
        allows=lambda found: found.module != "os",
        allows_call=lambda *_: True,
        forbidden="which is forbidden",
    )


def refused(payload, *words):
    with pytest.raises(CheckpointError) as caught:
        read(payload)
    for word in ("some.pkl: ", "use another one", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol_come_back(protocol):
    value = [
        "text",
        "ä",
        0,
        -1,
        300,
        70000,
        1 << 40,
        1.5,
        None,
        True,
        False,
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        [],
        [[1], "text"],
    ]
    assert read(pickle.dumps(value, protocol)) == value
    found = read(pickle.dumps({"a": 1, (1, 2): "b"}, protocol))
    assert isinstance(found, Pairs) and found.items == [("a", 1), ((1, 2), "b")]


def test_sets_objects_and_calls_are_described():
    found = read(pickle.dumps({1, 2}, 4))
    assert isinstance(found, Collection) and sorted(found.items) == [1, 2]
    found = read(pickle.dumps(PurePosixPath("a/b"), 4))
    assert (
        isinstance(found, Record)
        and found.what == Global("pathlib", "PurePosixPath")
        and found.args == ("a", "b")
    )
    found = read(pickle.dumps(Point(1, (2, 3)), 4))
    assert (
        isinstance(found, Record)
        and found.what.name == "Point"
        and found.state.items == [("x", 1), ("y", (2, 3))]
    )


def test_a_forbidden_global_is_named_and_not_called(tmp_path):
    refused(b"cos\nmkdir\n(X\x01\x00\x00\x00ttR.", "refers to os.mkdir, which is forbidden")
    refused(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "refers to os.system")


def test_a_key_that_takes_ages_to_hash_is_not_hashed():
    started = time.monotonic()
    found = read(b"\x80\x02}K\x01\x85" + DOUBLED + b"K\x01s.")
    assert len(found.items) == 1 and time.monotonic() - started < 1


def test_more_opcodes_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("megatron_hypenet.untrusted.pickles.MAX_OPCODES", 1000)
    refused(b"\x80\x02]" + b"K\x01a" * 600 + b".", "more than 1,000 opcodes")


@pytest.mark.parametrize(
    "payload",
    [
        b"", b".", b"\x80\x02", b"K\x01K\x02.", b"(K\x01.", b"0.", b"h\x05.", b"K\x01a.",
        b"K\x01K\x02a.", b"K\x01K\x02s.", b"\x85.",
        b"K\x01b.", b"X\xff\xff\xff\x7fab.", b"\x80\x63.", b"]K\x01R.", b"I1\n.",
        b"(i__main__\nx\n.", b"\x8a\x08\x00.",
        b"X\x03\x00\x00\x00\xed\xa0\x80.", b"csome\nthing\n)\x81}b}b.", b"Q.", b"e.", b"}(K\x01u.",
    ],
)  # fmt: skip
def test_what_makes_no_value_is_damaged(payload):
    refused(payload, "damaged")


def test_any_bytes_end_in_a_value_or_in_one_error():
    chance = random.Random(0)
    whole = pickle.dumps({"a": [1, (2, "three"), {4.5}], "b": KIND.advice * 3}, 4)
    for _ in range(3000):
        content = bytearray(
            whole[: chance.randrange(len(whole) + 1)] if chance.random() < 0.3 else whole
        )
        for _ in range(chance.randrange(1, 6)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            read(bytes(content))
        except CheckpointError as error:
            assert "\n" not in str(error)
