import math

import pytest
import torch

from megatron_hypenet.ops.logits_scale import logits_scale

POSITIONS = torch.tensor([0, 1, 499, 100_000])


@pytest.mark.parametrize(("value", "a"), [("hype 500", 500.0), ("hype", 362.0), ("hype 2.5", 2.5)])
def test_hype_grows_with_the_logarithm_of_the_position(value, a):
    want = [math.log(t + a) / math.log(a) for t in POSITIONS.tolist()]
    got = logits_scale(value, POSITIONS, torch.float64)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert got[0] == 1.0


def test_off_and_constant():
    assert logits_scale(None, POSITIONS, torch.float32) is None
    assert logits_scale(1.5, POSITIONS, torch.float32).tolist() == [1.5] * 4


@pytest.mark.parametrize("value", ["hyp", "hype 1", "hype -3", -1.0, True])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        logits_scale(value, POSITIONS, torch.float32)
