import torch

from megatron_hypenet.ops.dtypes import accumulation_dtype


def test_sums_are_kept_in_fp32_or_in_the_dtype_itself_where_that_is_longer():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert accumulation_dtype(dtype) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
