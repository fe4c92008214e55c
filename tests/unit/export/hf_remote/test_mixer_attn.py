import pytest
import torch

from megatron_hypenet.export.hf_remote import mixer_attn as remote
from megatron_hypenet.ops import logits_scale

from .conftest import close


@pytest.mark.parametrize("setting", [None, "hype", "hype 500", 1.5])
def test_query_scale_is_the_training_code_s(setting):
    positions = torch.arange(0, 100_000, 7919)
    got = remote.query_scale(setting, positions[None], torch.float64)
    want = logits_scale.logits_scale(setting, positions, torch.float64)
    if want is None:
        assert got is None
    else:
        close(got.expand(1, 1, len(positions), 1)[0, 0, :, 0], want)


@pytest.mark.parametrize("setting", ["hype 1", "log"])
def test_query_scale_refuses(setting):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        remote.query_scale(setting, torch.arange(3)[None], torch.float64)
