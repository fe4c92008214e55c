import pytest

from megatron_hypenet.export.hf_config import hf_config_from_model, mixer_spellings
from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig

from ..conftest import model_config
from .conftest import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_reads_what_the_export_writes(name):
    mixer = mixer_spellings()[name]
    student = model_config(student=True, attn_logits_scaling="hype 500")
    raw = hf_config_from_model(student.with_mixers((mixer, "attn", mixer)), torch_dtype="float32")
    assert raw["attn_logits_scaling"] == "hype 500" and name in raw["mixer_types"]
    config = HypeNetConfig.from_dict(dict(raw))  # transformers 4.57 writes into its argument
    for name, value in raw.items():
        if name not in ("architectures", "auto_map", "torch_dtype", "rope_scaling"):
            assert getattr(config, name) == value, name


def test_survives_saving(make_config, tmp_path):
    make_config(rope_theta=777.0, tie_word_embeddings=True, eos_token_id=[1, 2]).save_pretrained(
        tmp_path
    )
    again = HypeNetConfig.from_pretrained(tmp_path)
    assert again.rope_theta == 777.0 and again.tie_word_embeddings and again.eos_token_id == [1, 2]
    assert again.mixer_types == ["lightning-attn", "attn", "lightning-attn"]


def test_theta_may_stand_in_rope_parameters(make_config):
    assert (
        make_config(rope_parameters={"rope_type": "default", "rope_theta": 9.0}).rope_theta == 9.0
    )
    with pytest.raises(ValueError, match="plain RoPE or that of Llama 3.*yarn"):
        make_config(rope_parameters={"rope_type": "yarn", "rope_theta": 9.0})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_survives_saving(make_config, tmp_path, key):
    settings = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    given = {"rope_type": "llama3", **settings}
    config = make_config(rope_theta=777.0, attn_use_qk_norm=False, qkv_bias=True, **{key: given})
    assert config.llama3_scaling._asdict() == settings
    config.save_pretrained(tmp_path)
    again = HypeNetConfig.from_pretrained(tmp_path)
    assert again.llama3_scaling == config.llama3_scaling and again.rope_theta == 777.0
    assert again.qkv_bias and not again.attn_use_qk_norm
    assert make_config().llama3_scaling is None


def test_older_spelling_of_a_mixer(make_config):
    assert make_config(mixer_types=["lightning_attn", "attn", "attn"]).mixer_types == [
        "lightning-attn",
        "attn",
        "attn",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_use_rope": True}, "attn_use_rope=True .supported: False"),
        ({"lightning_use_short_conv": True}, "lightning_use_short_conv=True"),
        ({"lightning_nkv": 2}, "lightning_nkv=2 .supported: 6"),
        ({"rope_scaling": {"type": "yarn"}}, "plain RoPE or that of Llama 3.*yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "one rope_theta, here 6.0"),
        ({"attn_use_qk_norm": None}, "attn_use_qk_norm is true or false, got None"),
        ({"qkv_bias": 1}, "qkv_bias is true or false, got 1"),
        ({"mixer_types": ["attn", "mamba2", "attn"]}, "mixer_types must name"),
        ({"mixer_types": ["attn"]}, "for 3 layers"),
        ({"num_key_value_heads": 4}, "must divide num_attention_heads=6"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must name full_attention or"),
    ],
)
def test_refuses_what_the_code_does_not_do(make_config, change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**change)
