"""Teachers of every family beside transformers' own models, in float64: random weights, written by
transformers, imported, run, and exported again."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_hypenet.checkpoint.load import load_model
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export import verify
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.model.hypenet import build_model

LIMIT = 1e-6
"""Largest accepted difference of logits, relative to the largest one. RoPE's tables are fp32 on
both sides; measured were 1.7e-7 to 3.4e-7."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {"rope_type": "default", "rope_theta": 100000.0}
FAMILIES = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "head_dim": 16}),
    # 9 heads over 3 keys and values, tied head, no head_dim: SmolLM2-135M in small
    "smollm2": (
        "Llama",
        {
            "rope_parameters": PLAIN,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN}),
    "qwen3-yarn": ("Qwen3", {"rope_parameters": YARN, "head_dim": 16}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, tmp_path_factory):
    """Provide (folder, transformers' model in float64) of one family."""
    name, changes = FAMILIES[request.param]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # norms near one; biases and matrices large enough to matter
            parameter.normal_(0.0, 0.1).add_(1.0 if "norm" in _name(model, parameter) else 0.0)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    model.save_pretrained(folder)
    return folder, model


def _name(model, wanted):
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


def _ids(rows=2, length=48):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(4))


def test_an_imported_teacher_gives_transformers_logits(teacher, tmp_path):
    folder, model = teacher
    config = import_hf(folder, tmp_path / "ckpt")
    ours = build_model(config, ParallelConfig(), dtype=torch.float64).eval()
    load_model(ours, tmp_path / "ckpt")
    with torch.no_grad():
        want, got = model(_ids()).logits, ours(_ids())
    assert (got - want).abs().max() / want.abs().max() < LIMIT
    assert config.num_parameters == sum(p.numel() for p in ours.parameters())


def test_verify_compares_it_layer_by_layer(teacher, tmp_path):
    folder, _ = teacher
    import_hf(folder, tmp_path / "ckpt")
    report = verify.verify(folder, tmp_path / "ckpt", dtype="float64", num_tokens=48)
    report.require_ok()
    assert report.logits.max_rel_diff < LIMIT


def test_an_exported_teacher_is_the_same_model_of_the_same_family(teacher, tmp_path):
    folder, model = teacher
    import_hf(folder, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["architectures"] == [type(model).__name__]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float64
    )
    with torch.no_grad():
        assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)
