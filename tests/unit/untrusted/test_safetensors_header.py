"""A safetensors header is believed only when it fits the file to the byte."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.safetensors_header import TensorHeader, read_header

KIND = FileKind(error=ConversionError, advice="fetch it again", max_bytes=10_000)


def written(path, header, body=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.zeros((), dtype=torch.bfloat16),
        "d": torch.zeros(5, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    want = {"a": ("F32", (2, 3)), "b": ("F32", (0, 4)), "c": ("BF16", ()), "d": ("BOOL", (5,))}
    found = read_header(KIND, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    starts = {"c": data + 24, "d": data + 26}  # the widest dtype comes first: a, then b of no bytes
    assert found == {
        name: TensorHeader(*entry, starts.get(name, data if name == "a" else data + 24))
        for name, entry in want.items()
    }


@pytest.mark.parametrize(
    ("header", "length", "word"),
    [
        (one(), 1 << 63, "not a complete safetensors file"),
        (one(), 0, "not valid JSON"),
        (b" " * 20_000, None, "the limit is 10,000"),
        (b"[]", None, "no JSON object"),
        (b"{" + b'"a":1,' * 2 + b'"b":2}', None, "twice"),
        ({"a": 3}, None, "has no dtype, shape and data_offsets"),
        (one(more=1), None, "or more"),
        (one(dtype="F31"), None, "none of safetensors"),
        (one(dtype=["F32"]), None, "none of safetensors"),
        (one(shape=(-2, -1)), None, "no lists of counts"),
        (one(shape=(2.0,)), None, "no lists of counts"),
        (one(shape=(True, 2)), None, "no lists of counts"),
        (one(shape=(1,) * 100), None, "no lists of counts"),
        (one(offsets=(0, 8, 16)), None, "no lists of counts"),
        (one(shape=(3,)), None, "which is not the 8 bytes"),
        (one(shape=(1 << 60, 1 << 60)), None, "which is not the 8 bytes"),
        (one(offsets=(8, 16)), None, "start at 8, those before end at 0"),
        (one(shape=(1,), offsets=(0, 4)), None, "describes 4 bytes of tensors, it has 8"),
        (one() | {"b": one()["a"]}, None, "start at 0, those before end at 8"),
        (one() | {"__metadata__": {"a": 1}}, None, "__metadata__"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, header, length, word):
    with pytest.raises(ConversionError, match="x: ") as caught:
        read_header(KIND, written(tmp_path / "x", header, length=length))
    assert word in str(caught.value) and "fetch it again" in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, size):
    written(tmp_path / "x", one())
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:size])
    with pytest.raises(ConversionError, match="not a complete safetensors file"):
        read_header(KIND, tmp_path / "x")
