import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_hypenet.config.model import ModelConfig, check_logits_scaling
from megatron_hypenet.errors import ConfigError

TEACHER = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 512,
    "share_embeddings_and_output_weights": True,
    "mixer_types": ("attn",) * 4,
    "attn_use_rope": True,
    "attn_use_output_gate": False,
}


def make(**changes):
    return ModelConfig.model_validate({**TEACHER, **changes})


def test_teacher_and_student():
    teacher = make()
    assert teacher.is_teacher and teacher.attention_layers == (0, 1, 2, 3)
    student = teacher.with_mixers(["lightning_attn", "attn", "lightning_attn", "attn"])
    assert student.attention_layers == (1, 3)
    assert not student.is_teacher and not student.attn_use_rope and student.attn_use_output_gate
    assert teacher.is_teacher  # unchanged
    # a student that kept every softmax layer is still no teacher: it has no RoPE
    assert not teacher.with_mixers(["attn"] * 4).is_teacher


def test_derived_sizes_do_not_assume_heads_times_channels_is_hidden():
    config = make(kv_channels=32)
    assert (config.query_size, config.kv_size, config.heads_per_group) == (128, 64, 2)


def test_json_round_trip_is_exact():
    config = make(attn_logits_scaling="hype 500", rotary_base=1e6, eos_token_id=3)
    text = config.to_json()
    assert ModelConfig.from_json(text) == config
    assert text.endswith("}\n") and list(json.loads(text))[0] == "num_layers"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_later_fields_are_written_only_where_they_say_something():
    later = {"qk_layernorm": False, "add_qkv_bias": True, "rope_scaling": LLAMA3}
    assert not set(later) & set(json.loads(make().to_json()))
    config = make(**later)
    assert later.items() <= json.loads(config.to_json()).items()
    assert ModelConfig.from_json(config.to_json()) == config


def test_a_student_keeps_norms_biases_and_frequencies_of_its_teacher():
    teacher = make(qk_layernorm=False, add_qkv_bias=True, rope_scaling=LLAMA3)
    student = teacher.with_mixers(["lightning_attn", "attn", "lightning_attn", "attn"])
    names = {
        mixer: {parameter.name for parameter in student.spec(mixer).parameters(student)}
        for mixer in ("attn", "lightning_attn")
    }
    assert student.rope_scaling == teacher.rope_scaling
    assert {"q_bias", "k_bias", "v_bias"} <= names["attn"] & names["lightning_attn"]
    assert "q_norm.weight" not in names["attn"]
    assert {"q_norm.weight", "k_norm.weight"} <= names["lightning_attn"]


def test_parameters_count_biases_and_norms():
    plain = make().num_parameters
    assert make(qk_layernorm=False).num_parameters == plain - 4 * 2 * 16
    assert make(add_qkv_bias=True).num_parameters == plain + 4 * (64 + 2 * 32)


def test_no_student_of_a_teacher_with_yarn():
    teacher = make(rope_scaling=YARN)
    with pytest.raises(ConfigError, match="yarn.*no student can be made of it"):
        teacher.with_mixers(["attn"] * 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk_layernorm": "no"}, "qk_layernorm"),
        ({"add_qkv_bias": 1}, "add_qkv_bias"),
        ({"rope_scaling": {**LLAMA3, "rope_type": "linear"}}, "rope_scaling"),
        ({"num_query_groups": 3}, "num_query_groups=3 does not divide num_attention_heads=4"),
        ({"kv_channels": 15}, "kv_channels=15 is odd"),
        ({"mixer_types": ("attn",) * 3}, "3 entries for num_layers=4"),
        (
            {"mixer_types": ("attn", "", "mamba3", "attn")},
            "unknown mixers .*'', 'mamba3'.*; known mixers: attn, .*lightning_attn",
        ),
        ({"num_layers": 0}, "greater than 0"),
        ({"num_layers": True}, "valid integer"),
        ({"hidden_size": "64"}, "valid integer"),
        ({"attn_logits_scaling": "hyper"}, "'hype <a>'"),
        ({"num_key_value_heads": 2}, "Extra inputs"),
    ],
)
def test_refused(change, says):
    with pytest.raises(ValidationError, match=says):
        make(**change)


def test_a_message_is_bounded():
    long = "x" * 99_999
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_json(json.dumps({**TEACHER, "attn_logits_scaling": long}))
    assert len(str(raised.value)) < 2000


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make().num_layers = 5


def test_replace_validates():
    assert make().replace(vocab_size=1024).vocab_size == 1024
    with pytest.raises(ValidationError, match="does not divide"):
        make().replace(num_query_groups=3)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"num_layers": 4}', '{"surprise": 1}'])
def test_damaged_json_is_a_config_error(text):
    with pytest.raises(ConfigError, match="model configuration is invalid"):
        ModelConfig.from_json(text)


@given(a=st.floats(min_value=1.001, max_value=1e6, allow_nan=False))
def test_hype_with_any_constant_above_one(a):
    text = f"hype {a:.3f}"
    assert check_logits_scaling(text) == text


def test_scaling_forms():
    assert check_logits_scaling(None) is None
    assert check_logits_scaling(" hype   500 ") == "hype 500"
    assert check_logits_scaling("hype") == "hype"
    assert check_logits_scaling(2) == 2.0


@pytest.mark.parametrize(
    "value",
    ["hype 1", "hype 0.5", "hype -3", "hype x", "1.5", "", True, 0, -1.0, float("nan"), {}, [1]],
)
def test_scaling_refused(value):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        check_logits_scaling(value)
