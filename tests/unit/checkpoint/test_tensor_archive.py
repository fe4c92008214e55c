"""The archive is byte for byte what torch.save writes."""

import io
import zlib

import pytest
import torch

from megatron_hypenet.checkpoint.tensor_archive import combined_crc, is_supported, tensor_archive

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (), (3, 1), (7, 5, 3), (300, 70_000)])
def test_equals_torch_save(dtype, shape):
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    stream = io.BytesIO()
    torch.save(values, stream)
    content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    archive = tensor_archive(shape, dtype)
    assert archive.length == len(stream.getvalue()) and archive.num_bytes == len(content)
    assert archive.head + content + archive.tail(zlib.crc32(content)) == stream.getvalue()
    assert len(archive.tail(0)) == archive.tail_bytes and is_supported(dtype)


def test_another_format_of_torch_is_noticed(monkeypatch):
    is_supported.cache_clear()
    monkeypatch.setattr(torch, "save", lambda value, stream: stream.write(b"something else"))
    try:
        with pytest.raises(Exception):  # noqa: B017 - no zip file: nothing that is caught as ours
            tensor_archive((3, 1), torch.int8)
        assert not is_supported(torch.float64)
    finally:
        is_supported.cache_clear()


@pytest.mark.parametrize("cut", [0, 1, 4, 1000, 4999, 5000])
def test_crc_of_parts(cut):
    content = bytes(range(250)) * 20
    one = content[:cut]
    other = content[cut:]
    assert combined_crc(zlib.crc32(one), zlib.crc32(other), len(other)) == zlib.crc32(content)
