"""The table against the names and shapes that megatron-core gives a GPTModel, and its inverse."""

import pytest

from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export import mapping, megatron_names
from tests.tiny import tiny_teacher_config

CONFIG = tiny_teacher_config()
# printed by GPTModel.sharded_state_dict for this shape, with 64 rows of vocabulary
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (24,),
    "self_attention.linear_qkv.weight": (96, 24),
    "self_attention.q_layernorm.weight": (8,),
    "self_attention.k_layernorm.weight": (8,),
    "self_attention.linear_proj.weight": (24, 48),
    "mlp.linear_fc1.layer_norm_weight": (24,),
    "mlp.linear_fc1.weight": (80, 24),
    "mlp.linear_fc2.weight": (24, 40),
}
LONG = f"decoder.layers.1{'0' * 5000}.x"
MODEL = {
    "embedding.word_embeddings.weight": (64, 24),
    "decoder.final_layernorm.weight": (24,),
    "output_layer.weight": (64, 24),
}


def test_names_and_shapes_are_megatrons():
    layers = {
        f"decoder.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in LAYER.items()
    }
    found = megatron_names.theirs_from_ours(CONFIG, 64)
    assert {tensor.name: tensor.shape for tensor in found} == MODEL | layers
    tied = CONFIG.replace(share_embeddings_and_output_weights=True)
    assert "output_layer.weight" not in {
        tensor.name for tensor in megatron_names.theirs_from_ours(tied, 64)
    }


@pytest.mark.parametrize("split", [False, True])
def test_every_row_of_ours_is_somewhere_in_theirs_and_back(split):
    ours = {entry.ours: entry.shape for entry in mapping.entries(CONFIG)}
    theirs = megatron_names.theirs_from_ours(CONFIG, 64, split_fc1=split)
    back = megatron_names.ours_from_theirs(CONFIG, 64, split_fc1=split)
    assert {tensor.name: tensor.shape for tensor in back} == ours
    for tensor in (*theirs, *back):
        assert sum(block.rows for block in tensor.blocks) == tensor.shape[0], tensor.name


def test_groups_are_interleaved():
    fused = next(t for t in megatron_names.theirs_from_ours(CONFIG, 61) if "linear_qkv.w" in t.name)
    letters = [(block.source[-1], block.first, block.rows) for block in fused.blocks]
    assert letters == [
        ("q", 0, 16), ("k", 0, 8), ("v", 0, 8),
        ("q", 16, 16), ("k", 8, 8), ("v", 8, 8),
        ("q", 32, 16), ("k", 16, 8), ("v", 16, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stack", "layer"),
    [
        ("decoder.layers.12.mlp.x", "decoder.layers.mlp.x", 12),
        ("decoder.layers.mlp.x", "decoder.layers.mlp.x", None),
        ("decoder.layers.٣.mlp.x", "decoder.layers.٣.mlp.x", None),
        (LONG, LONG, None),
        ("output_layer.weight", "output_layer.weight", None),
    ],
)
def test_stack_and_layer_of_a_name(name, stack, layer):
    assert megatron_names.split_stack(name) == (stack, layer)


def test_optimizer_states_are_known_by_their_names():
    for name in ("optimizer.state.exp_avg.decoder.x", "chained_0.optimizer.state.x"):
        assert megatron_names.is_optimizer_state(name)
    for name in ("decoder.optimizer.x", "embedding.word_embeddings.weight", "chained_0.x"):
        assert not megatron_names.is_optimizer_state(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_layer.weight": None}, r"1 of 19 tensors are missing: output_layer.weight"),
        ({"decoder.layers.0.mlp.linear_fc1.bias": (80,)}, "linear_fc1.bias. Only GPTModels"),
        ({"decoder.final_layernorm.weight": (23,)}, r"has shape \[23\], but .* \[24\]"),
    ],
)
def test_other_tensors_are_refused(change, message):
    expected = megatron_names.theirs_from_ours(CONFIG, 64)
    found = {tensor.name: tensor.shape for tensor in expected} | change
    found = {name: shape for name, shape in found.items() if shape is not None}
    with pytest.raises(ConversionError, match=message):
        megatron_names.check_tensors(expected, found, where="X")
