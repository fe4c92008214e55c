import pytest

from megatron_hypenet.config.mixers.gated_delta_net import GatedDeltaNetSpec
from megatron_hypenet.export import hf_config
from megatron_hypenet.ops import gated_delta_rule, kernels  # noqa: F401 - registers its family
from tests.tiny import tiny_model_config

CONFIG = tiny_model_config(("gated_delta_net",))


def names(spec):
    return {parameter.name for parameter in spec.parameters(CONFIG)}


def test_settings_decide_the_parameters():
    grouped = GatedDeltaNetSpec()
    assert grouped.sections(CONFIG) == {
        "q": 48, "k": 24, "v": 24, "gate": 48, "beta": 6, "decay": 6,
    }  # fmt: skip
    assert GatedDeltaNetSpec(expand_kv=True).sections(CONFIG)["k"] == 48
    assert "gate" not in GatedDeltaNetSpec(gate=False).sections(CONFIG)
    assert names(grouped) - names(GatedDeltaNetSpec(qk_norm=False)) == {
        "q_norm.weight",
        "k_norm.weight",
    }


def test_rates_stay_in_float32():
    exact = {one.name for one in GatedDeltaNetSpec().parameters(CONFIG) if one.dtype == "float32"}
    assert exact == {"A_log", "dt_bias"}


def test_groups_have_to_fit_the_ranks():
    assert set(GatedDeltaNetSpec().layout_rules(CONFIG).tensor_slices) == {
        "num_attention_heads",
        "num_query_groups",
    }
    assert set(GatedDeltaNetSpec(expand_kv=True).layout_rules(CONFIG).tensor_slices) == {
        "num_attention_heads"
    }


def test_selective_recomputation_keeps_the_sections_alone():
    spec = GatedDeltaNetSpec()
    assert spec.saved_activations(CONFIG, 1, "selective") == sum(spec.sections(CONFIG).values())
    assert (
        spec.saved_activations(CONFIG, 2, "none") == spec.saved_activations(CONFIG, 1, "none") / 2
    )


def test_its_kernel_family_exists():
    assert set(GatedDeltaNetSpec.kernel_families) <= set(kernels.FAMILIES)


def raw(spec, **changes):
    config = CONFIG.with_mixers(("gated_delta_net",), (spec,))
    return hf_config.hf_config_from_model(config, torch_dtype="float32") | changes


def test_the_published_defaults_are_not_ours():
    """Keys that config.json leaves out have the values that the published code assumes."""
    given = raw(GatedDeltaNetSpec(qk_norm=False, rope=False, gate=False))
    for key in ("gdn_use_qk_norm", "gdn_use_rope", "gdn_use_gate", "expand_kv_proj"):
        del given[key]
    read = hf_config.model_config_from_hf(given, where="x")
    assert read.spec("gated_delta_net") == GatedDeltaNetSpec(qk_norm=False, rope=False, gate=False)


@pytest.mark.parametrize(
    ("spec", "changes", "says"),
    [
        (GatedDeltaNetSpec(), {"gdn_nkv": 6}, "gdn_nkv = 6: supported is 3"),
        (GatedDeltaNetSpec(expand_kv=True), {"gdn_nkv": 3}, "gdn_nkv = 3: supported is 6"),
        (GatedDeltaNetSpec(), {"gdn_use_short_conv": True}, "gdn_use_short_conv = True"),
        (GatedDeltaNetSpec(), {"gdn_use_mamba": True}, "gdn_use_mamba = True: unknown switch"),
        (
            GatedDeltaNetSpec(),
            {"gdn_use_gate": "yes"},
            "gate: should be a valid boolean, got 'yes'",
        ),
    ],
)
def test_what_config_json_may_not_say(spec, changes, says):
    with pytest.raises(hf_config.ConfigError, match=says):
        hf_config.model_config_from_hf(raw(spec, **changes), where="x")


def test_keys_that_change_nothing_are_accepted():
    given = raw(GatedDeltaNetSpec(activation="swish"), gdn_attn_mode="chunk", gdn_expand_v=1)
    assert hf_config.model_config_from_hf(given, where="x").spec("gated_delta_net") == (
        GatedDeltaNetSpec(activation="swish")
    )


def test_two_mixers_that_need_different_values_have_no_hugging_face_form():
    config = tiny_model_config(("gated_delta_net", "lightning_attn"))
    with pytest.raises(hf_config.ConfigError, match="different values of expand_kv_proj"):
        hf_config.hf_config_from_model(config, torch_dtype="float32")
