import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.model.mixers.lightning_attn import LightningAttn
from megatron_hypenet.model.mixers.softmax_attn import SoftmaxAttn
from tests.activation_memory import bytes_held
from tests.tiny import tiny_model_config, tiny_teacher_config

IDS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def build(config=None, **kwargs):
    return build_model(
        config or tiny_model_config(), ParallelConfig(), dtype=torch.float64, seed=3, **kwargs
    )


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_the_log_softmax_of_the_logits(tied):
    model = build(tiny_model_config(share_embeddings_and_output_weights=tied))
    logits = model(IDS)
    nll, correct = model.token_scores(IDS)
    want = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none"
    ).view(2, 10)
    torch.testing.assert_close(nll, want)
    assert torch.equal(correct, logits[:, :-1].argmax(-1) == IDS[:, 1:])
    assert (model.head_weight() is model.embedding.word_embeddings.weight) == tied


def test_hidden_states_are_the_layer_inputs_and_the_final_norm():
    model = build()
    states = model.hidden_states(IDS)
    assert len(states) == 3 and all(state.shape == (2, 11, 24) for state in states)
    torch.testing.assert_close(states[0], F.embedding(IDS, model.embedding.word_embeddings.weight))
    torch.testing.assert_close(F.linear(states[-1], model.head_weight()), model(IDS))


def test_a_trunk_has_nothing_after_its_last_mixer():
    config = tiny_teacher_config(share_embeddings_and_output_weights=True)
    names = [name for name, _ in build(config, trunk_only=True).named_parameters()]
    assert names[-1].startswith("decoder.layers.1.self_attention.")
    assert not any("final_layernorm" in name or "output_layer" in name for name in names)


def test_logit_scaling_can_be_switched_and_matters_only_past_position_zero():
    model = build()
    off = model(IDS)
    model.set_attn_logits_scaling("hype 4")
    on = model(IDS)
    torch.testing.assert_close(on[:, 0], off[:, 0])
    assert (on[:, 3:] - off[:, 3:]).abs().max() > 1e-9
    model.set_attn_logits_scaling(None)
    assert torch.equal(model(IDS), off)


def test_checkpoint_keys_are_layout_free_tensors():
    keys = build().sharded_state_dict()
    assert not any("_extra_state" in key for key in keys)
    assert {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
    } <= set(keys)
    parts = keys["decoder.layers.0.self_attention.linear_in.weight"].build()
    assert [part.key.rsplit(".", 1)[-1] for part in parts.values()] == ["q", "k", "v", "gate"]


def test_mixers_can_be_read_and_replaced_by_global_index():
    model = build()
    first = model.mixer(0)
    model.set_mixer(0, model.mixer(1))
    assert model.mixer(0) is model.mixer(1) and model.mixer(0) is not first
    with pytest.raises(KeyError, match="layer 2"):
        model.mixer(2)
    with pytest.raises(KeyError, match="layer 5"):
        model.set_mixer(5, first)


def test_recomputing_gives_the_same_gradients_and_holds_less():
    config = tiny_model_config(("lightning_attn", "attn", "lightning_attn"))
    documents = torch.tensor([[0] * 6 + [1] * 14, [0] * 20], dtype=torch.int32)
    gradients, held = {}, {}
    for mode in ("none", "selective", "full"):
        model = build_model(config, ParallelConfig(), dtype=torch.float64, seed=3, recompute=mode)
        hidden, held[mode] = bytes_held(model, IDS, documents[: len(IDS), : IDS.shape[1]])
        hidden.square().sum().backward()
        gradients[mode] = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    for mode in ("selective", "full"):
        assert gradients[mode].keys() == gradients["none"].keys()
        for name, want in gradients["none"].items():
            torch.testing.assert_close(gradients[mode][name], want, rtol=1e-12, atol=1e-14)
    assert held["selective"] < 0.7 * held["none"] and held["full"] < 0.5 * held["selective"]


def test_selective_holds_what_the_products_read_or_made():
    """A recurrent layer keeps, per token, its input and the residual in the middle, and the results
    of both input projections."""
    held = [
        bytes_held(
            build(tiny_model_config(("lightning_attn",) * layers), recompute="selective"), IDS
        )[1]
        for layers in (1, 2)
    ]
    assert (held[1] - held[0]) / 8 / IDS.numel() == pytest.approx(
        2 * 24 + 4 * 48 + 2 * 40, rel=0.01
    )


def test_selective_computes_only_recurrent_mixers_again(monkeypatch):
    calls = []
    for mixer in (LightningAttn, SoftmaxAttn):
        mix = mixer.mix
        monkeypatch.setattr(
            mixer, "mix", lambda self, *args, mix=mix: calls.append(self.name) or mix(self, *args)
        )
    build(recompute="selective").hidden(IDS).sum().backward()
    assert calls == ["lightning_attn", "attn", "lightning_attn"]


def test_selective_recomputing_changes_nothing_without_gradients():
    model = build(recompute="selective").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS), build()(IDS))
