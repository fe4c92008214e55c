"""What GPTModel reads: names, interleaved rows, padding, arguments; and nothing half-written."""

import pytest
import torch

from megatron_hypenet.checkpoint import load, save, stream
from megatron_hypenet.checkpoint.shard_index import read_contents
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.errors import CheckpointError, ConversionError
from megatron_hypenet.export import mapping
from megatron_hypenet.export.megatron_args import Padding, read_arguments
from megatron_hypenet.export.to_megatron import plan_to_megatron, to_megatron
from megatron_hypenet.model.transfer import named_normal
from tests.tiny import tiny_model_config, tiny_teacher_config

CONFIG = tiny_teacher_config()


def teacher(folder, config=CONFIG, **replaced):
    """Write a checkpoint whose every tensor is a function of its name."""
    tensors = {
        entry.ours: named_normal(entry.ours, tuple(entry.shape), std=0.1, seed=0)
        for entry in mapping.entries(config)
    }
    save.write_weights(folder, tensors | replaced, config, kind="teacher")
    return folder


def written(folder):
    tensors, objects = read_contents(folder / "release")
    return ShardReader(folder / "release", tensors), objects


def test_stacks_of_layers_with_interleaved_groups(tmp_path):
    ours = load.open_weights(teacher(tmp_path / "ckpt"))
    assert to_megatron(tmp_path / "ckpt", tmp_path / "out") == CONFIG
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    theirs, objects = written(tmp_path / "out")
    fused = theirs["decoder.layers.self_attention.linear_qkv.weight"].view(2, 3, 4, 8, 24)
    for layer in range(2):
        prefix = f"decoder.layers.{layer}.self_attention.linear_in.weight."
        q, k, v = fused[layer].split([2, 1, 1], dim=1)
        for letter, part in (("q", q), ("k", k), ("v", v)):
            assert torch.equal(part.reshape(-1, 24), ours[prefix + letter])
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    }
    for name, own in names.items():
        both = torch.stack([ours[f"decoder.layers.{layer}.{own}"] for layer in range(2)])
        assert torch.equal(theirs[f"decoder.layers.{name}"], both)
    assert "decoder.layers.mlp.linear_fc2._extra_state/shard_1_2" in objects


def test_vocabulary_is_padded_with_zeros_and_the_arguments_say_so(tmp_path):
    ours = load.open_weights(teacher(tmp_path / "ckpt"))
    padding = Padding(divisible_by=16, tensor_parallel=3)
    plan = plan_to_megatron(tmp_path / "ckpt", padding=padding)
    assert plan.vocab_rows == 96
    to_megatron(tmp_path / "ckpt", tmp_path / "out", padding=padding)
    theirs, objects = written(tmp_path / "out")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert theirs.shape(name) == (96, 24)
        assert torch.equal(theirs[name][:61], ours[name]) and not theirs[name][61:].any()
    found = read_arguments(tmp_path / "out/release", objects)
    assert (found["vocab_size"], found["padded_vocab_size"]) == (61, 96)
    assert (found["num_query_groups"], found["rotary_base"]) == (3, 10000)
    assert found["untie_embeddings_and_output_weights"] is True


def test_the_bytes_do_not_depend_on_pieces_or_workers(tmp_path, monkeypatch):
    teacher(tmp_path / "ckpt")
    to_megatron(tmp_path / "ckpt", tmp_path / "one", workers=1)
    monkeypatch.setattr(stream, "PIECE_BYTES", 200)
    to_megatron(tmp_path / "ckpt", tmp_path / "two", workers=3)
    for file in (tmp_path / "one/release").iterdir():
        assert (tmp_path / "two/release" / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_dtype_is_written_when_asked_for(tmp_path):
    teacher(tmp_path / "ckpt")
    to_megatron(tmp_path / "ckpt", tmp_path / "out", dtype="bfloat16")
    reader, _ = written(tmp_path / "out")
    assert {reader.dtype(name) for name in reader} == {torch.bfloat16}


def test_a_teacher_of_another_family_is_refused_by_name(tmp_path):
    teacher(tmp_path / "ckpt", tiny_teacher_config(qk_layernorm=False, add_qkv_bias=True))
    with pytest.raises(ConversionError, match="qk_layernorm=False, add_qkv_bias=True: to-megatron"):
        to_megatron(tmp_path / "ckpt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_student_is_refused_in_one_sentence(tmp_path):
    teacher(tmp_path / "ckpt", tiny_model_config())
    with pytest.raises(ConversionError, match="is a HypeNet student .*convert export") as caught:
        to_megatron(tmp_path / "ckpt", tmp_path / "out")
    assert str(caught.value).count(". ") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_what_exists_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="out already exists"):
        to_megatron(teacher(tmp_path / "ckpt"), tmp_path / "out")


NAN = {"decoder.layers.1.mlp.linear_fc2.weight": torch.full((24, 40), torch.nan)}
MIXED = {"decoder.layers.0.self_attention.linear_in.weight.k": torch.zeros(24, 24).bfloat16()}
LAYER = {"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(24, 40).bfloat16()}


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (NAN, "960 of 960 values that are NaN"),
        (MIXED, "become one tensor but are stored as torch.bfloat16, torch.float32"),
        (LAYER, "linear_fc2.weight are stored as torch.float32 and torch.bfloat16"),
    ],
)
def test_a_bad_tensor_leaves_nothing(tmp_path, replaced, message):
    teacher(tmp_path / "ckpt", **replaced)
    with pytest.raises(ConversionError, match=message):
        to_megatron(tmp_path / "ckpt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_changed_byte_of_the_checkpoint_is_found_and_leaves_nothing(tmp_path):
    file = teacher(tmp_path / "ckpt") / "weights/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="__0_0.distcp"):
        to_megatron(tmp_path / "ckpt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
