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


@pytest.mark.parametrize("dtype", tensors.DTYPES.values(), ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 17, 4094, 4095])
def test_one_value_that_is_not_finite_is_found_and_counted(dtype, value, place):
    values = torch.linspace(-3, 3, 4096).to(dtype)
    assert tensors.all_finite(values)
    tensors.check_finite("w", values, lambda: [], where="x")
    values[place] = value
    with pytest.raises(ConversionError, match="^x: w has 2 of 8192 values that are NaN or inf"):
        tensors.check_finite("w", values, lambda: [values, values], where="x")


def test_blocks(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_VALUES", 10)
    values = torch.arange(27.0)

    def read(first, target):
        target.copy_(values[first : first + target.numel()])

    blocks = [block.tolist() for block in tensors.blocks_of(read, 27, torch.float32, unit=4)]
    assert [len(block) for block in blocks] == [8, 8, 8, 3]
    assert sum(blocks, []) == values.tolist()


def test_scratch_is_used_again():
    scratch = tensors.Scratch()
    first = scratch.take(8, torch.float32)
    assert scratch.take(10, torch.bfloat16).data_ptr() == first.data_ptr()
    assert scratch.take(100, torch.float64).shape == (100,)
