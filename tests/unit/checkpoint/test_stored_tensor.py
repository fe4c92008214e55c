"""A tensor of torch.save is read bit for bit; anything else in its bytes is refused."""

import io
import pickle
import zipfile

import pytest
import torch

from megatron_hypenet.checkpoint.stored_tensor import locate_tensor, read_whole
from megatron_hypenet.errors import CheckpointError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def saved(value):
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


def read(path, content, shape, dtype=torch.float32):
    path.write_bytes(b"before" + content + b"after")
    with path.open("rb") as stream:
        shape = tuple(shape)
        place = locate_tensor(path, stream, 6, len(content), shape=shape, dtype=dtype)
        return read_whole(path, stream, place, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (0, 4)])
def test_every_dtype_and_shape_comes_back(tmp_path, dtype, shape):
    want = torch.randint(0, 2, shape).to(dtype)
    got = read(tmp_path / "x", saved(want), shape, dtype)
    assert got.dtype == dtype and got.shape == want.shape
    assert torch.equal(
        got.contiguous().view(torch.uint8) if shape else got.float(),
        want.contiguous().view(torch.uint8) if shape else want.float(),
    )


def test_views_and_parameters_come_back(tmp_path):
    want = torch.arange(12.0).view(3, 4)
    assert torch.equal(read(tmp_path / "x", saved(want.T), (4, 3)), want.T)
    assert torch.equal(read(tmp_path / "x", saved(want[1:, 2:]), (2, 2)), want[1:, 2:])
    assert torch.equal(read(tmp_path / "x", saved(torch.nn.Parameter(want)), (3, 4)), want)


def without(content, ending):
    """Return a zip file's bytes without the members whose names end so."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            if not name.endswith(ending):
                new.writestr(name, old.read(name))
    return target.getvalue()


@pytest.mark.parametrize("member", ["version", "data.pkl", "data/0"])
def test_a_member_that_torch_needs_is_missed(tmp_path, member):
    content = saved(torch.ones(3))
    assert torch.equal(read(tmp_path / "x", without(content, "no such"), (3,)), torch.ones(3))
    with pytest.raises(CheckpointError, match=f"no member .*{member}"):
        read(tmp_path / "x", without(content, f"/{member}"), (3,))


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1},
        [torch.zeros(2)],
        3,
        torch.zeros(3),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(1, 2),
    ],
    ids=str,
)
def test_another_value_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="no plain tensor|the index says|needs no such thing"):
        read(tmp_path / "x", saved(value), (2,))


def test_what_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return __import__("os").mkdir, (str(tmp_path / "owned"),)

    with pytest.raises(CheckpointError, match=r"posix.mkdir"):
        read(tmp_path / "x", saved(Evil()), (2,))
    assert not (tmp_path / "owned").exists()


class Storage:
    """Stands for a storage while a tensor's pickle is written by hand."""

    def __init__(self, count):
        self.count = count


def by_hand(count, offset, size, stride, body=b"\0" * 16):
    """Build a torch file whose pickle describes a tensor in any way."""
    target = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            return (
                ("storage", torch.FloatStorage, "0", "cpu", found.count)
                if isinstance(found, Storage)
                else None
            )

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                Storage(count),
                offset,
                size,
                stride,
                False,
                None,
            )

    Pickler(target, 2).dump(Tensor())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", target.getvalue())
        archive.writestr("archive/data/0", body)
    return out.getvalue()


@pytest.mark.parametrize(
    "described",
    [
        (4, 0, (1 << 40,), (1,)), (4, 1, (4,), (1,)), (4, 0, (4,), (2,)), (4, -1, (4,), (1,)),
        (4, 0, (4,), (-1,)), (5, 0, (4,), (1,)),
        (1 << 50, 0, (4,), (1,)), (4, 0, (4,), (1, 1)), (4, 0, [4], (1,)), (4, 0, (4.0,), (1,)),
        (True, 0, (1,), (1,)),
    ],
)  # fmt: skip
def test_a_tensor_beyond_its_bytes_is_refused(tmp_path, described):
    assert read(tmp_path / "x", by_hand(4, 0, (4,), (1,)), (4,)).tolist() == [0, 0, 0, 0]
    with pytest.raises(
        CheckpointError, match=r"x: .*(do not hold it|no plain tensor|the index says)"
    ):
        read(
            tmp_path / "x",
            by_hand(*described),
            (4,) if described[2] != (1 << 40,) else described[2],
        )


def test_damaged_bytes_end_in_one_error_or_a_tensor(tmp_path):
    whole = saved(torch.arange(6.0))
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 + position % 255
        try:
            assert read(tmp_path / "x", bytes(content), (6,)).shape == (6,)
        except CheckpointError as error:
            assert "\n" not in str(error)
