import json

import pytest

from megatron_hypenet.errors import ConfigError, ConversionError
from megatron_hypenet.export import hf_config

from .conftest import model_config


def hf(*, student=False, **changes):
    raw = hf_config.hf_config_from_model(model_config(student=student), torch_dtype="bfloat16")
    return {**raw, **changes}


def read(raw):
    return hf_config.model_config_from_hf(raw, where="config.json")


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(student, tied):
    config = model_config(
        student=student,
        share_embeddings_and_output_weights=tied,
        max_position_embeddings=4096,
        rotary_base=12345.5,
    )
    assert read(hf_config.hf_config_from_model(config, torch_dtype="float32")) == config


def test_logits_scaling_round_trip():
    for value in ("hype 500", "hype", 1.5, None):
        config = model_config(student=True, attn_logits_scaling=value)
        assert (
            read(hf_config.hf_config_from_model(config, torch_dtype="float32")).attn_logits_scaling
            == value
        )


def test_exported_names_are_the_published_ones():
    raw = hf(student=True)
    assert raw["architectures"] == ["HypeNetForCausalLM"] and raw["model_type"] == "hypenet"
    assert raw["mixer_types"] == ["lightning-attn", "attn", "lightning-attn"]
    assert raw["auto_map"]["AutoModelForCausalLM"] == "modeling_hypenet.HypeNetForCausalLM"
    teacher = hf()
    assert (
        teacher["architectures"] == ["Qwen3ForCausalLM"]
        and "mixer_types" not in teacher
        and "auto_map" not in teacher
    )


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "model_type": "hybrid",
            "architectures": ["HybridForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_hybrid.HybridConfig"},
        },
        {"architectures": ["HybridForCausalLM"]},
        {"model_type": "hybrid_of_another_name", "architectures": ["HybridForCausalLM"]},
        {"model_type": None, "architectures": ["HypeNetForCausalLM"]},
        {"architectures": None},
        {"mixer_types": ["lightning_attn", "attn", "lightning-attn"]},
    ],
)
def test_published_spellings_are_the_same_model(spelling):
    assert read(hf(student=True, **spelling)) == model_config(student=True)


def test_transformers_5_spelling():
    raw = hf()
    theta = raw.pop("rope_theta")
    del raw["rope_scaling"], raw["torch_dtype"]
    assert (
        read(
            {
                **raw,
                "dtype": "bfloat16",
                "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            }
        )
        == model_config()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True: supported is False"),
        ({"attention_bias": 0}, "attention_bias = 0: supported is False"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: supported is 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': supported is 'silu'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling = .*linear.*supported is plain RoPE",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = .*original_max_posit"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters = .*yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            r"rope_theta states different values \[5.0, 1000000.0\]",
        ),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"use_sliding_window": True}, "use_sliding_window = True: supported is False"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types = .*sliding_attention",
        ),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"num_experts": 8}, "num_experts = 8: supported are dense models only"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*fp8"),
        ({"qk_norm": False}, "qk_norm = False: supported is True"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"num_key_value_heads": 3}, "num_query_groups=3 does not divide num_attention_heads=4"),
        ({"hidden_size": "32"}, "hidden_size: should be a valid integer, got '32'"),
        ({"intermediate_size": 0}, "intermediate_size: should be greater than 0, got 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: should be a valid number, got '1e-6'"),
        ({"rms_norm_eps": True}, "rms_norm_eps: should be a valid number, got true"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: should be a valid boolean"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings: should be a valid boolean, got 0"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6': expected a number"),
        ({"eos_token_id": [None]}, r"eos_token_id: should be a valid integer, got \[None\]"),
        ({"eos_token_id": 5000}, r"eos_token_id = 5000: the model has the tokens 0 to \d+"),
        ({"pad_token_id": 5000}, r"pad_token_id = 5000: the model has the tokens 0 to \d+"),
    ],
)
@pytest.mark.parametrize("student", [False, True])
def test_unsupported_settings_of_any_model_are_refused(student, change, message):
    with pytest.raises(ConfigError, match=message):
        read(hf(student=student, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_use_rope": True}, "attn_use_rope = True: supported is False"),
        ({"attn_use_output_gate": False}, "attn_use_output_gate = False: supported is True"),
        ({"expand_kv_proj": False}, "expand_kv_proj = False: supported is True"),
        (
            {"lightning_nkv": 2},
            "lightning_nkv = 2: supported is 4, the value of num_attention_heads",
        ),
        ({"lightning_nh": 8}, "lightning_nh = 8: supported is 4"),
        (
            {"lightning_head_dim": 16},
            "lightning_head_dim = 16: supported is 8, the value of head_dim",
        ),
        ({"lightning_scale": "1/d"}, "lightning_scale = '1/d': supported is '1/sqrt\\(d\\)'"),
        ({"lightning_use_rope": False}, "lightning_use_rope = False: supported is True"),
        ({"lightning_use_qk_norm": False}, "lightning_use_qk_norm = False"),
        ({"lightning_use_output_norm": False}, "lightning_use_output_norm = False"),
        ({"lightning_use_output_gate": False}, "lightning_use_output_gate = False"),
        ({"lightning_use_short_conv": True}, "lightning_use_short_conv = True: supported is False"),
        ({"lightning_rope_scaling": 2.0}, "lightning_rope_scaling = 2.0"),
        (
            {"lightning_use_forget_gate": True},
            "lightning_use_forget_gate = True: unknown switch of a mixer",
        ),
        (
            {"mixer_types": ["attn", "mamba", "attn"]},
            r"mixer_types has \['mamba'\]: supported are \['attn'",
        ),
        (
            {"mixer_types": ["attn"]},
            "mixer_types has 1 entries: supported is one per layer, num_hidden_layers = 3",
        ),
        ({"mixer_types": None}, "mixer_types = None: supported is a list"),
        ({"attn_logits_scaling": "hype 1"}, "needs a > 1"),
        ({"attn_logits_scaling": "log"}, "attn_logits_scaling"),
    ],
)
def test_unsupported_settings_of_a_hypenet_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        read(hf(student=True, **change))


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        read(
            hf(
                student=True,
                attention_bias=True,
                hidden_act="relu",
                lightning_use_rope=False,
                attn_use_rope=True,
                num_experts=4,
            )
        )
    text = str(caught.value)
    assert "5 setting(s)" in text
    assert all(
        key in text
        for key in (
            "attention_bias",
            "hidden_act",
            "lightning_use_rope",
            "attn_use_rope",
            "num_experts",
        )
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
        {"model_type": "hypenet"},  # contradicts the architecture
        {"architectures": ["Qwen3ForSequenceClassification"]},
        {"model_type": None, "architectures": None},
    ],
)
def test_unknown_models_are_refused(change):
    with pytest.raises(ConfigError, match="not supported; supported model types are"):
        read(hf(**change))


def test_harmless_keys_are_accepted_and_given_back():
    extra = {
        "gdn_num_heads": 4,
        "kda_x": True,
        "mamba2_y": None,
        "use_mup": "note",
        "lightning_conv_size": 4,
    }
    raw = hf(student=True, **extra, transformers_version="4.57.1", _name_or_path="somewhere")
    out = hf_config.hf_config_from_model(read(raw), torch_dtype="float32", origin=raw)
    assert out.items() >= extra.items()
    assert "transformers_version" not in out and "_name_or_path" not in out


def test_a_student_of_a_teacher_folder_drops_what_only_qwen3_has():
    teacher = hf(
        max_window_layers=3,
        sliding_window=None,
        layer_types=["full_attention"] * 3,
        eos_token_id=[2, 5],
        note=1,
    )
    out = hf_config.hf_config_from_model(
        model_config(student=True), torch_dtype="float32", origin=teacher
    )
    assert not {"max_window_layers", "sliding_window", "use_sliding_window"} & set(out)
    assert out["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]
    assert out["eos_token_id"] == [2, 5] and out["note"] == 1


def test_layer_types_repeat_the_mixers():
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    assert hf(student=True)["layer_types"] == kinds and "layer_types" not in hf()
    for given in (kinds, ["full_attention"] * 3, None):  # the second as a teacher's folder has it
        assert read(hf(student=True, layer_types=given)) == model_config(student=True)
    with pytest.raises(ConfigError, match="layer_types = .*or .*what mixer_types says"):
        read(hf(student=True, layer_types=kinds[1:] + kinds[1:2]))


def test_a_list_of_end_tokens_uses_the_first():
    assert read(hf(eos_token_id=[7, 5])).eos_token_id == 7


def test_a_model_between_the_families_has_no_hf_form():
    with pytest.raises(ConfigError, match="no Hugging Face form"):
        hf_config.hf_config_from_model(
            model_config(attn_use_output_gate=True), torch_dtype="float32"
        )


def test_reading_the_file(tmp_path):
    with pytest.raises(ConversionError, match="no config.json"):
        hf_config.read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="not valid JSON"):
        hf_config.read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConversionError, match="expected an object at the top, got list"):
        hf_config.read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf()))
    assert hf_config.read_hf_config(tmp_path) == hf()


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 500_000_000, "layer_types": None}, {"num_hidden_layers": 10**90},
        {"vocab_size": 10**15},
        {"hidden_size": 1 << 40}, {"num_attention_heads": 10**9, "num_key_value_heads": 1},
        {"head_dim": 1 << 30},
        {"intermediate_size": 10**90}, {"num_hidden_layers": True}, {"hidden_size": [1]},
        {"architectures": [[1]]},
        {"architectures": [{}], "model_type": {}}, {"model_type": [1]}, {"rope_parameters": [1]},
        {"eos_token_id": [[1]]},
        {"eos_token_id": 10**90}, {"layer_types": "full_attention"}, {"hidden_act": ["silu"]},
    ],
)  # fmt: skip
def test_sizes_and_types_that_no_model_has_are_refused_at_once(change):
    with pytest.raises(ConfigError) as caught:
        hf_config.model_config_from_hf({**hf(), **change}, where="config.json")
    assert len(str(caught.value)) < 2000


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConversionError, match="leads out of the folder"):
        hf_config.read_hf_config(tmp_path / "hf")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "yarn",
    ],
    ids=["transformers 5", "by layer type", "text"],
)
def test_yarn_alone_is_what_is_wrong_with_yarn(rope):
    raw = hf_config.hf_config_from_model(model_config(), torch_dtype="float32")
    raw = {
        key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")
    } | {"rope_parameters": rope}
    with pytest.raises(ConfigError, match="rope_parameters = .*yarn") as failure:
        hf_config.model_config_from_hf(raw, where="here")
    assert "1 setting" in str(failure.value) and "theta is missing" not in str(failure.value)
