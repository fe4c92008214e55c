import pytest

from megatron_hypenet.config.mixers.kimi_delta_attention import KimiDeltaAttentionSpec
from megatron_hypenet.export import hf_config
from megatron_hypenet.ops import kernels, kimi_delta_attention  # noqa: F401 - registers its family
from tests.tiny import tiny_model_config

CONFIG = tiny_model_config(("kimi_delta_attention",))
CONV = KimiDeltaAttentionSpec(conv=True, conv_size=4)


def test_sections_and_convolutions():
    assert KimiDeltaAttentionSpec().sections(CONFIG) == {
        "q": 48, "k": 48, "v": 48, "beta": 6, "decay_down": 8, "gate_down": 8,
    }  # fmt: skip
    plain, with_conv = (
        {one.name: one for one in spec.parameters(CONFIG)}
        for spec in (KimiDeltaAttentionSpec(), CONV)
    )
    assert set(with_conv) - set(plain) == {"q_conv", "k_conv", "v_conv"}
    assert with_conv["q_conv"].shape == (48, 4)
    assert with_conv["q_conv"].hf_transform.shape == (48, 1, 4)
    assert plain["A_log"].hf_transform.shape == (1, 1, 6, 1)
    assert {name for name, one in plain.items() if one.dtype == "float32"} == {"A_log", "dt_bias"}


def test_a_convolution_reads_over_chunk_borders():
    assert KimiDeltaAttentionSpec().layout_rules(CONFIG).halo_tokens == 0
    rules = CONV.layout_rules(CONFIG)
    assert rules.halo_tokens == 3 and set(rules.tensor_slices) == {
        "num_attention_heads",
        "kv_channels",
    }


@pytest.mark.parametrize("size", [None, 1, 65])
def test_a_convolution_needs_its_size(size):
    with pytest.raises(ValueError, match="kda_conv_size"):
        KimiDeltaAttentionSpec(conv=True, conv_size=size)


def test_flops_count_the_second_halves_of_the_low_rank_projections():
    base, conv = (spec.core_flops(CONFIG, 100) for spec in (KimiDeltaAttentionSpec(), CONV))
    assert conv - base == 3 * 2 * 4 * 48
    assert base > 2 * 2 * 8 * 48


def test_selective_recomputation_keeps_the_sections_alone():
    spec = KimiDeltaAttentionSpec()
    assert spec.saved_activations(CONFIG, 1, "selective") == sum(spec.sections(CONFIG).values())
    more = CONV.saved_activations(CONFIG, 1, "none") - spec.saved_activations(CONFIG, 1, "none")
    assert more == 6 * 48


def test_its_kernel_family_exists():
    assert set(KimiDeltaAttentionSpec.kernel_families) <= set(kernels.FAMILIES)


def raw(spec, **changes):
    config = CONFIG.with_mixers(("kimi_delta_attention",), (spec,))
    return hf_config.hf_config_from_model(config, torch_dtype="float32") | changes


def test_the_published_defaults():
    """q and k are normalised unless config.json says otherwise, and not rotated unless it says
    so."""
    given = raw(KimiDeltaAttentionSpec(rope=False))
    for key in ("kda_use_qk_norm", "kda_use_rope", "kda_use_conv", "kda_conv_size"):
        del given[key]
    read = hf_config.model_config_from_hf(given, where="x").spec("kimi_delta_attention")
    assert read == KimiDeltaAttentionSpec(rope=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kda_use_conv": True}, "needs conv_size .kda_conv_size. from 2 to 64, got None"),
        ({"kda_num_heads": 3}, "kda_num_heads = 3: supported is 6"),
        ({"kda_gate": "low"}, "kda_gate = 'low': unknown switch"),
        ({"expand_kv_proj": False}, "expand_kv_proj = False: supported is True"),
    ],
)
def test_what_config_json_may_not_say(changes, says):
    with pytest.raises(hf_config.ConfigError, match=says):
        hf_config.model_config_from_hf(raw(KimiDeltaAttentionSpec(), **changes), where="x")
