"""A small HypeNet of the exported modelling code, in float64, with 6 heads (no power of two)."""

import pytest
import torch

from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM

SIZES = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
)
MIXERS = ["lightning-attn", "attn", "lightning-attn"]
VARIANTS = {
    "lightning-attn": {},
    "gdn": dict.fromkeys(("gdn_use_qk_norm", "gdn_use_rope", "gdn_use_gate"), True),
    "kda": {"kda_use_rope": True, "kda_use_conv": True, "kda_conv_size": 4},
}
"""Settings by recurrent mixer, with much of what each can do."""


@pytest.fixture
def make_config():
    """make_config(**changes) -> HypeNetConfig."""
    return lambda **changes: HypeNetConfig(
        **{**SIZES, "mixer_types": MIXERS, "attn_logits_scaling": "hype 50", **changes}
    )


@pytest.fixture
def make_model(make_config):
    """make_model(**changes) -> HypeNetForCausalLM in float64 with random weights large enough to
    matter."""

    def build(**changes):
        torch.manual_seed(5)
        model = HypeNetForCausalLM(make_config(**changes)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
            for name, parameter in model.named_parameters():
                if name.endswith("dt_bias"):  # memories of one token and of some hundred
                    parameter.sub_(3.0).mul_(2.0)
        return model

    return build


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    """Provide a model of every recurrent mixer, with softmax attention between its layers."""
    return make_model(mixer_types=[request.param, "attn", request.param], **VARIANTS[request.param])


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def tokens(rows, count, seed=0):
    return torch.randint(53, (rows, count), generator=torch.Generator().manual_seed(seed))


def padded(rows, total, *, left=True, filler=1):
    ids = torch.full((len(rows), total), filler)
    mask = torch.zeros(len(rows), total, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(total - len(row), total) if left else slice(0, len(row))
        ids[index, where] = row
        mask[index, where] = 1
    return ids, mask


@pytest.fixture
def rows():
    return [tokens(1, count, seed=count)[0] for count in (5, 12, 1, 9)]
