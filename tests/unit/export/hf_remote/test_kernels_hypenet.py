"""The kernels launched directly, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from megatron_hypenet.export.hf_remote import kernels_hypenet as remote

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 2, 32), (6, 6, 24), (6, 1, 80)])
@pytest.mark.parametrize("padded", [False, True])
def test_splits_are_joined_to_whole_attention(monkeypatch, length, heads, groups, d, padded):
    monkeypatch.setattr(remote, "_PROGRAMS", 16)
    b = 2
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(b, heads, 1, d, generator=generator).to(DEVICE)
    k, v = torch.randn(2, b, groups, 768, d, generator=generator).to(DEVICE)
    real = None
    mask = torch.arange(768, device=DEVICE)[None] < length
    if padded:
        real = (torch.rand(b, 1000, generator=generator) > 0.4).to(DEVICE)
        real[0, :length] = False  # a row of padding sees itself
        last = torch.arange(768, device=DEVICE)[None] == length - 1
        mask = mask & (real[:, :768] | last)
    k[:, :, length:] = torch.nan  # memory that has not been written
    v[:, :, length:] = torch.nan
    at = torch.tensor([length - 1], device=DEVICE)
    got = remote.attend_in_place(q, k, v, at, real)
    wide = [
        x.double().nan_to_num().repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v)
    ]
    want = F.scaled_dot_product_attention(*wide, attn_mask=mask[:, None, None])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_take():
    assert not remote.can_attend(torch.zeros(1, 2, 1, 8)), "a CPU has no use for them"
