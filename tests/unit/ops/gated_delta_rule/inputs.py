"""Random inputs of the gated delta rule, as its mixers give them: normalised keys, decays from weak
to so strong that a product of them would overflow when inverted."""

import torch


def drawn(t, *, per_channel=False, b=2, h=3, dk=8, dv=6, seed=0, strongest=12.0):
    """Draw q, k [b, t, h, dk], v [b, t, h, dv], log decay, beta in (0, 2); float64 leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(b, t, h, dk), dim=-1) for _ in range(2))
    shape = (b, t, h, dk) if per_channel else (b, t, h)
    strength = torch.rand(shape, generator=generator, dtype=torch.float64)
    decay = -strongest * strength**4
    beta = 2 * torch.sigmoid(normal(b, t, h))
    return tuple(x.requires_grad_() for x in (q, k, normal(b, t, h, dv), decay, beta))
