import pytest
import torch

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import mapping, tensors
from tests.unit.export.test_mapping import student


def test_split_undoes_join():
    for entry in mapping.entries(student()):
        parts = [torch.randn(entry.part_shape) for _ in entry.hf]
        joined = tensors.join(entry, parts)
        assert joined.shape == entry.shape
        back = entry.split(joined)
        assert list(back) == list(entry.hf)
        assert all(
            torch.equal(back[name], part) and back[name].is_contiguous()
            for name, part in zip(entry.hf, parts, strict=True)
        )


def test_gate_comes_before_up():
    entry = next(entry for entry in mapping.entries(student()) if "linear_fc1" in entry.ours)
    gate, up = torch.zeros(entry.part_shape), torch.ones(entry.part_shape)
    assert entry.hf[0].endswith("gate_proj.weight")
    assert torch.equal(tensors.join(entry, [gate, up])[: entry.part_shape[0]], gate)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 2), r"shape \[3, 2\], the configuration asks for \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int8), "stored as int8; supported are float32"),
        (
            torch.tensor([[0.0, torch.nan, 1], [0, torch.inf, 1]]),
            "2 of 6 values that are NaN or infinite",
        ),
    ],
)
def test_bad_tensor_is_named(tensor, message):
    with pytest.raises(ConversionError, match=message):
        tensors.check_tensor("w", tensor, (2, 3), where="x")


@pytest.mark.parametrize("dtype", tensors.DTYPES.values(), ids=str)
def test_good_tensor_passes(dtype):
    tensors.check_tensor("w", torch.ones(2, 3, dtype=dtype), (2, 3), where="x")
