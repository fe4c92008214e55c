"""Layers one at a time give what the whole models give, in both implementations."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hypenet.checkpoint import load
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export import layerwise
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM
from megatron_hypenet.export.plan import plan_import
from megatron_hypenet.model.hypenet import build_model

IDS = torch.randint(67, (2, 20), generator=torch.Generator().manual_seed(1))


def whole_checkpoint(folder, dtype, rounded):
    model = build_model(load.read_model_config(folder), ParallelConfig(), dtype=dtype).eval()
    load.load_model(model, folder)
    round_weights(model, rounded)
    with torch.no_grad():
        return [*model.hidden_states(IDS), model(IDS)]


def whole_hf(folder, student, dtype, rounded):
    if student:
        config = HypeNetConfig.from_pretrained(folder)
        model = HypeNetForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    round_weights(model.eval(), rounded)
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True, use_cache=False)
    return [*out.hidden_states, out.logits]


def round_weights(model, dtype):
    if dtype is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))


@pytest.mark.parametrize(
    "mixer", [None, "gated_delta_net", "kimi_delta_attention", "lightning_attn"]
)
@pytest.mark.parametrize(
    ("dtype", "rounded", "tied"),
    [("float64", None, True), ("float32", torch.bfloat16, False), ("bfloat16", None, True)],
)
def test_layers_one_at_a_time_are_the_whole_model(
    hf_model, tmp_path, monkeypatch, mixer, dtype, rounded, tied
):
    monkeypatch.setattr(layerwise, "_HEAD_ROWS", 30)
    changes = {} if mixer is None else {"mixer_types": (mixer, "attn", mixer)}
    model = hf_model(student=mixer is not None, share_embeddings_and_output_weights=tied, **changes)
    folder = model.write(tmp_path / "hf")
    import_hf(folder, tmp_path / "ckpt")
    plan = plan_import(folder)
    values = getattr(torch, dtype)
    for found, want in (
        (
            layerwise.run_checkpoint(tmp_path / "ckpt", plan.config, IDS, dtype, rounded),
            whole_checkpoint(tmp_path / "ckpt", values, rounded),
        ),
        (
            layerwise.run_hf(plan, IDS, dtype, rounded),
            whole_hf(folder, mixer is not None, values, rounded),
        ),
    ):
        assert len(found) == len(want) == 5
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other.cpu())
