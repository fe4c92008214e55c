import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.rows import as_rows, warps_of_row


def test_rows_are_views_wherever_their_columns_lie_side_by_side():
    wide = torch.arange(48.0).view(2, 3, 8)
    for x, copied in (
        (wide, False),
        (wide[..., 2:6], False),
        (wide[:, 1], False),
        (wide[..., ::2], True),
        (wide.transpose(1, 2), True),
    ):
        rows = as_rows(x)
        assert rows.shape == (x.numel() // x.shape[-1], x.shape[-1]) and rows.stride(1) == 1
        assert (
            torch.equal(rows, x.reshape(rows.shape))
            and (rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied
        )


@pytest.mark.parametrize(
    ("width", "warps"), [(1, 4), (512, 4), (2048, 4), (4096, 8), (8192, 16), (16384, 16)]
)
def test_warps_grow_with_the_row(width, warps):
    assert warps_of_row(width) == warps
