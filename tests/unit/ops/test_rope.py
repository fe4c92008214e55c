import torch

from megatron_hypenet.ops.rope import apply_rope


def angles(length, dim, start=0):
    frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    half = torch.outer(torch.arange(start, start + length, dtype=torch.float64), frequency)
    return torch.cat((half, half), dim=-1)[:, None, None]


def test_position_zero_is_the_identity_and_norms_are_kept():
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    y = apply_rope(x, angles(5, 8))
    torch.testing.assert_close(y[0], x[0], rtol=0, atol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    q, k = q.expand(12, 1, 1, 16), k.expand(12, 1, 1, 16)
    near = (apply_rope(q, angles(12, 16))[7] * apply_rope(k, angles(12, 16))[3]).sum()
    far = (
        apply_rope(q, angles(12, 16, start=100))[7] * apply_rope(k, angles(12, 16, start=100))[3]
    ).sum()
    torch.testing.assert_close(near, far)


def test_dtype_of_the_input_is_kept():
    x = torch.randn(3, 1, 1, 4, dtype=torch.bfloat16)
    assert apply_rope(x, angles(3, 4).float()).dtype == torch.bfloat16
