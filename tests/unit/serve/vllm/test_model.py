"""What the engine asks of the model, what it refuses, and the model compiled."""

import pytest

from tests import vllm_engine as vllm

ASK = """
from types import SimpleNamespace as Some
from megatron_hypenet.serve.vllm import model

def refused(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)

split = lambda heads, groups, ranks: refused(
    model.check_ranks, Some(num_attention_heads=heads, num_key_value_heads=groups), ranks
)
mixers = lambda *names: refused(model.state_class, Some(mixer_types=names))
answer({
    "mixers": sorted(model.MIXERS),
    "parameters": [
        model.parameter_of("model.layers.3.self_attn.k_proj.weight"),
        model.parameter_of("model.layers.3.mlp.up_proj.weight"),
        model.parameter_of("model.layers.3.self_attn.f_a_proj.weight"),
        model.parameter_of("model.layers.3.self_attn.A_log"),
    ],
    "may be split": [split(6, 2, 2), split(6, 2, 1), split(8, 2, 4)],
    "odd": split(6, 2, 4),
    "between": split(6, 3, 2),
    "one kind": mixers("kda", "attn"),
    "two kinds": mixers("kda", "attn", "lightning-attn"),
    "none": mixers("attn"),
})
"""


@pytest.mark.slow
def test_names_splits_and_refusals():
    found = vllm.inside(ASK)
    from megatron_hypenet.export.hf_remote.mixers_hypenet import MIXERS

    assert found["mixers"] == sorted(MIXERS)
    prefix = "model.layers.3"
    assert found["parameters"] == [
        [f"{prefix}.self_attn.qkv_proj.weight", ["k"]],
        [f"{prefix}.mlp.gate_up_proj.weight", [1]],
        [f"{prefix}.self_attn.f_a_proj.weight", []],
        [f"{prefix}.self_attn.A_log", []],
    ]
    assert found["may be split"] == [None] * 3 and found["one kind"] is None
    assert "6 heads with 2 key/value heads cannot be split over 4" in found["odd"]
    assert "6 heads with 3 key/value heads cannot be split over 2" in found["between"]
    assert "this one has kda and lightning-attn" in found["two kinds"]
    assert "this one has none" in found["none"]


@pytest.mark.slow
@pytest.mark.timeout(600)  # the compiler needs C++ for each graph
def test_a_compiled_model_with_a_tied_head(same_tokens):
    same_tokens("lightning-attn", {"enforce_eager": False}, tie_word_embeddings=True)


@pytest.mark.slow
def test_a_tensor_that_the_model_does_not_have_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = vllm.write_folder(tmp_path / "folder", "lightning-attn")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.bias"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = vllm.engine(tmp_path, folder, [], fails=True)["said"]
    assert "model.layers.0.self_attn.bias: a HypeNet with these mixers has no such tensor" in said
