"""A GGUF header is believed only as far as the file reaches."""

import struct

import gguf
import numpy as np
import pytest

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted import gguf_header
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.gguf_header import GgufTensor, read_header

KIND = FileKind(error=ConversionError, advice="fetch it again", max_values=1000)
SIZES = {0: (1, 4), 3: (32, 20)}  # F32 and Q4_1


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


def tensor(name="a", shape=(2,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset
    )


def written(path, settings=(), tensors=(), data=64, version=3, counts=None):
    """Write a whole file by hand, so that each part of it can be wrong."""
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", *(counts or (len(tensors), len(settings))))
    head += b"".join((*settings, *tensors))
    path.write_bytes(head + b"\0" * (-len(head) % 32 + data))
    return path


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("n", 7)
    writer.add_float32("f", 0.5)
    writer.add_bool("yes", True)
    writer.add_array("words", ["a", "Ġb", "日"])
    writer.add_array("ids", [3, -1])
    small = np.arange(6, dtype=np.float32).reshape(2, 3)
    blocks = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("small", small)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(KIND, path, SIZES)
    assert header.settings == {
        "general.architecture": "llama",
        "n": 7,
        "f": 0.5,
        "yes": True,
        "words": ["a", "Ġb", "日"],
        "ids": [3, -1],
    }
    content = path.read_bytes()
    assert header.tensors == {
        "small": GgufTensor(0, (2, 3), content.index(small.tobytes()), 24),
        "blocks": GgufTensor(3, (2, 64), content.index(blocks.tobytes()), 80),
    }
    # every shorter file is refused
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(ConversionError, match=r"x\.gguf: .*fetch it again"):
            read_header(KIND, path, SIZES)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"version": 1}, "GGUF version 1"),
        ({"version": 3 << 24}, "big endian"),
        ({"counts": (0, 1 << 60)}, "more than 1,000 values"),
        ({"counts": (900, 900)}, "more than 1,000 values"),
        ({"counts": (0, 900)}, "occurs twice"),
        ({"settings": [struct.pack("<Q", 1 << 62)]}, "asks for"),
        ({"settings": [text("a") + struct.pack("<I", 99)]}, "a setting of type 99"),
        ({"settings": [text("a") + struct.pack("<IIQ", 9, 9, 1)]}, "a setting of type 9"),
        ({"settings": [text("a") + struct.pack("<IIQ", 9, 0, 1 << 50)]}, "1,000 values"),
        ({"settings": [text("a") + struct.pack("<IIQ", 9, 12, 800)]}, "asks for 6,400 bytes"),
        ({"settings": [number("a", 1), number("a", 2)]}, "a occurs twice"),
        ({"settings": [struct.pack("<Q", 2) + b"\xff\xff"]}, "not UTF-8"),
        ({"settings": [number("general.alignment", 24)]}, "general.alignment is 24"),
        ({"settings": [number("general.alignment", 0)]}, "general.alignment is 0"),
        ({"tensors": [tensor(), tensor()]}, "a occurs twice"),
        ({"tensors": [tensor(shape=(1,) * 5)]}, "5 dimensions"),
        ({"tensors": [tensor(shape=())]}, "0 dimensions"),
        ({"tensors": [tensor(kind=77)]}, "type 77; known types: 0, 3"),
        ({"tensors": [tensor(shape=(2, 33), kind=3)]}, "no whole blocks of 32"),
        ({"tensors": [tensor(shape=(1 << 63, 1 << 63))]}, "cut off"),
        ({"tensors": [tensor(shape=(17,))]}, "cut off"),
        ({"tensors": [tensor(offset=1 << 40)]}, "cut off"),
        ({"tensors": [tensor("a"), tensor("b", offset=4)]}, "the bytes of b start"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, parts, words):
    path = written(tmp_path / "x.gguf", **parts)
    with pytest.raises(ConversionError, match=words) as caught:
        read_header(KIND, path, SIZES)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 600


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + b"\0" * 100)
    for wrong, words in ((path, "not a GGUF file"), (tmp_path, "cannot be read|not a regular")):
        with pytest.raises(ConversionError, match=words):
            read_header(KIND, wrong, SIZES)


def test_a_header_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "x.gguf", settings=[number("a" * 200, 1)], data=600)
    read_header(KIND, path, SIZES)
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 100)
    with pytest.raises(ConversionError, match="its header is larger than"):
        read_header(KIND, path, SIZES)
