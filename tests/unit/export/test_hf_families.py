import pytest

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.export import hf_config
from megatron_hypenet.export.hf_families import TEACHERS, teacher_family

from .conftest import model_config

LLAMA = {"qk_layernorm": False}
QWEN2 = {"qk_layernorm": False, "add_qkv_bias": True}


def read(raw):
    return hf_config.model_config_from_hf(raw, where="config.json")


def written(config):
    return hf_config.hf_config_from_model(config, torch_dtype="float32")


@pytest.mark.parametrize(
    ("changes", "name", "architecture"),
    [
        ({}, "qwen3", "Qwen3ForCausalLM"),
        (LLAMA, "llama", "LlamaForCausalLM"),
        (QWEN2, "qwen2", "Qwen2ForCausalLM"),
    ],
)
def test_norms_and_biases_decide_the_family(changes, name, architecture):
    config = model_config(**changes)
    raw = written(config)
    assert teacher_family(config).model_type == raw["model_type"] == name
    assert raw["architectures"] == [architecture] and read(raw) == config


def test_a_teacher_with_norms_and_biases_has_no_form():
    with pytest.raises(ConfigError, match="qk_layernorm=True and add_qkv_bias=True is none of"):
        written(model_config(add_qkv_bias=True))


def test_a_llama_may_leave_out_what_transformers_fills_in():
    raw = written(model_config(**LLAMA, kv_channels=8, num_query_groups=4))
    full = read({**raw, "rope_theta": 10000.0, "max_position_embeddings": 2048, "bos_token_id": 1})
    short = {
        key: value
        for key, value in raw.items()
        if key not in ("rope_theta", "max_position_embeddings", "bos_token_id", "eos_token_id")
    }
    assert read({**short, "head_dim": None, "num_key_value_heads": None}) == full


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_head_dim_follows_from_the_width(name):
    config = model_config(**(LLAMA if name == "llama" else QWEN2))
    raw = written(config)
    del raw["head_dim"]
    assert read(raw) == config
    with pytest.raises(ConfigError, match="head_dim is missing"):
        read({**raw, "num_attention_heads": 3, "num_key_value_heads": 3})


def test_other_families_have_no_such_defaults():
    for name, gone in (("qwen3", "head_dim"), ("qwen2", "rope_theta")):
        raw = written(model_config(**({} if name == "qwen3" else QWEN2)))
        del raw[gone]
        with pytest.raises(ConfigError, match=f"{gone} is missing"):
            read(raw)


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        (LLAMA, {"attention_bias": True}, "attention_bias = True: supported is False"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True: supported is False"),
        (LLAMA, {"qkv_bias": True}, "qkv_bias = True: supported is False"),
        (LLAMA, {"use_qk_norm": True}, "use_qk_norm = True: supported is False"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: supported is 1.0"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu': supported is 'silu'"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts = 8: supported are dense models"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window = True: supported is False"),
        (QWEN2, {"qkv_bias": False}, "qkv_bias = False: supported is True"),
        (QWEN2, {"attention_bias": True}, "attention_bias = True: supported is False"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(changes, change, message):
    with pytest.raises(ConfigError, match=message):
        read({**written(model_config(**changes)), **change})


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("mistral", "MistralForCausalLM"),
        ("qwen2_moe", "Qwen2MoeForCausalLM"),
        ("llama", "Qwen2ForCausalLM"),
        ("llama4_text", "Llama4ForCausalLM"),
    ],
)
def test_another_model_is_refused_by_name(model_type, architecture):
    raw = {**written(model_config()), "model_type": model_type, "architectures": [architecture]}
    with pytest.raises(ConfigError, match=f"model_type '{model_type}'.*is not supported") as caught:
        read(raw)
    assert all(family.architecture in str(caught.value) for family in TEACHERS.values())


def test_a_student_says_what_it_has_from_its_teacher_only_where_it_differs():
    keys = ("attn_use_qk_norm", "qkv_bias")
    raw = written(model_config(student=True))
    assert not set(keys) & set(raw) and raw["rope_scaling"] is None
    for changes, want in ((LLAMA, (False, None)), (QWEN2, (False, True))):
        config = model_config(student=True, **changes)
        raw = written(config)
        assert tuple(raw.get(key) for key in keys) == want
        assert read(raw) == config
