"""Arguments are written as Megatron-LM writes them, and read without being unpickled."""

import argparse
import os
import pickle
import types
from collections import OrderedDict, defaultdict
from signal import Signals

import pytest
import torch

from megatron_hypenet.checkpoint.shard_index import StoredObject
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import megatron_args
from megatron_hypenet.export.megatron_args import Padding, problems_of, read_arguments, vocabulary
from tests.tiny import tiny_teacher_config

CONFIG = tiny_teacher_config()


class Evil:
    """Its pickle asks for a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def saved(folder, **values):
    torch.save(values, folder / "common.pt")
    return read_arguments(folder, {})


def test_what_is_written_is_read(tmp_path):
    written = megatron_args.arguments_of(CONFIG, Padding(divisible_by=16, tensor_parallel=2))
    found = saved(tmp_path, **megatron_args.common_state(written))
    assert found == vars(written)
    assert problems_of(found, CONFIG) == []
    assert (found["padded_vocab_size"], vocabulary(found, 64)) == (64, 61)
    # Megatron's own reader unpickles nothing else, either
    common = torch.load(tmp_path / "common.pt", weights_only=False)
    assert common["iteration"] == 0 and common["checkpoint_version"] == 3.0


def test_objects_of_other_classes_stay_inert(tmp_path):
    args = argparse.Namespace(
        num_layers=2,
        exit_signal=Signals.SIGTERM,
        params_dtype=torch.bfloat16,
        names=defaultdict(list, a=[1]),
        order=OrderedDict(a=1),
        evil=Evil(os.mkdir, str(tmp_path / "made")),
        tensor=torch.ones(2),
    )
    found = saved(tmp_path, args=args, optimizer={"param_groups": [{"lr": 1.0}]})
    assert found["num_layers"] == 2 and len(found) == 7
    assert not (tmp_path / "made").exists()
    assert megatron_args.told(found["evil"]) == "posix.mkdir"


def test_the_common_object_among_the_tensors_is_read(tmp_path):
    file = tmp_path / "__0_0.distcp"
    with file.open("wb") as stream:
        stream.write(b"x" * 100)
        torch.save([{"args": types.SimpleNamespace(num_layers=2)}], stream)
    place = StoredObject(file, 100, file.stat().st_size - 100)
    assert read_arguments(tmp_path, {"common_state/shard_0_1": place}) == {"num_layers": 2}
    assert read_arguments(tmp_path, {}) is None
    assert saved(tmp_path, iteration=3) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "no dictionary but list"),
        ({1: 2}, "no text"),
        ({"args": 3}, "'args' is int, not a Namespace"),
        ({"args": Evil(os.getcwd)}, "'args' is Record, not a Namespace"),
    ],
)
def test_what_is_no_namespace_is_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "common.pt")
    with pytest.raises(ConversionError, match=message):
        read_arguments(tmp_path, {})


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({"args": 1})])
def test_a_damaged_file_is_one_error(tmp_path, content):
    (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=r"common\.pt: .*restore it or use another"):
        read_arguments(tmp_path, {})


def test_problems_name_each_argument():
    given = {
        "rotary_percent": 0.5,
        "add_qkv_bias": True,
        "num_layers": 3,
        "norm_epsilon": 1e-5,
        "position_embedding_type": [[]],
        "swiglu": 1,
        "num_query_groups": 1,
        "kv_channels": None,
        "unknown": "x",
    }
    found = "\n".join(problems_of(given, CONFIG))
    for words in (
        "rotary_percent = 0.5: supported is 1.0",
        "add_qkv_bias = True: supported is False",
        "num_layers = 3, but the model has 2",
        "norm_epsilon = 1e-05, but the model has 1e-06",
        "position_embedding_type = list: supported is 'rope'",
        "swiglu = 1: supported is True",
    ):
        assert words in found
    assert found.count("\n") == 5  # without grouped queries their number says nothing
    assert "num_query_groups" in problems_of({**given, "group_query_attention": True}, CONFIG)[-1]


def test_a_value_that_holds_itself_many_times_is_not_spelled_out():
    value = ()
    for _ in range(60):
        value = (value, value)
    (problem,) = problems_of({"swiglu": value}, CONFIG)
    assert problem == "swiglu = tuple: supported is True"
    assert vocabulary({"vocab_size": 3, "tokenizer_type": value}, 3) == 3


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, None),
        ({"vocab_size": None, "padded_vocab_size": 128}, None),
        ({"vocab_size": 61}, 61),
        ({"vocab_size": 60, "tokenizer_type": "NullTokenizer"}, 61),
        (
            {"vocab_size": 61, "make_vocab_size_divisible_by": 64, "tensor_model_parallel_size": 2},
            61,
        ),
    ],
)
def test_the_vocabulary_without_its_padding(arguments, size):
    assert vocabulary(arguments, 128) == size


@pytest.mark.parametrize(
    "arguments",
    [
        {"vocab_size": 129},
        {"vocab_size": 0},
        {"vocab_size": 61, "make_vocab_size_divisible_by": 32, "tensor_model_parallel_size": 1},
    ],
)
def test_a_vocabulary_that_does_not_give_the_rows_is_refused(arguments):
    with pytest.raises(ConversionError, match="does not give the 128 rows"):
        vocabulary(arguments, 128)


def test_padding_is_megatrons_rule():
    assert Padding().rows(151669) == 151680
    assert Padding(tensor_parallel=8).rows(151936) == 152576
    assert Padding(divisible_by=1).rows(61) == 61
