"""Checkpoints as Megatron writes them on several layouts, and as nobody should: byte-equal weights
or one error, and nothing half-written."""

import argparse
import json
import os
import shutil

import pytest
import torch

from megatron_hypenet.checkpoint import load, save
from megatron_hypenet.checkpoint.shard_writer import ShardWrite
from megatron_hypenet.checkpoint.shards import Shard
from megatron_hypenet.errors import CheckpointError, ConfigError, ConversionError
from megatron_hypenet.export import hf_config, mapping
from megatron_hypenet.export.from_megatron import find_sharded, from_megatron, plan_from_megatron
from megatron_hypenet.export.megatron_args import Padding, arguments_of, common_state
from megatron_hypenet.model.transfer import named_normal
from tests.tiny import tiny_model_config, tiny_teacher_config
from tests.unit.export.conftest import TOKENIZER

CONFIG = tiny_teacher_config()
OURS = {
    entry.ours: named_normal(entry.ours, tuple(entry.shape), std=0.1, seed=0)
    for entry in mapping.entries(CONFIG)
}


def stacked(rows=64):
    """Return Megatron's tensors of OURS, built as its modules hold them."""

    def both(name):
        return torch.stack([OURS[f"decoder.layers.{layer}.{name}"] for layer in range(2)])

    def padded(name):
        return torch.cat([OURS[name], torch.full((rows - 61, 24), 9.0)])

    q, k, v = (both(f"self_attention.linear_in.weight.{letter}") for letter in "qkv")
    groups = [part.view(2, 3, -1, 24) for part in (q, k, v)]
    layers = {
        "self_attention.linear_qkv.weight": torch.cat(groups, dim=2).view(2, 96, 24),
        "self_attention.linear_qkv.layer_norm_weight": both("input_layernorm.weight"),
        "self_attention.q_layernorm.weight": both("self_attention.q_norm.weight"),
        "self_attention.k_layernorm.weight": both("self_attention.k_norm.weight"),
        "self_attention.linear_proj.weight": both("self_attention.linear_proj.weight"),
        "mlp.linear_fc1.layer_norm_weight": both("pre_mlp_layernorm.weight"),
        "mlp.linear_fc1.weight": both("mlp.linear_fc1.weight"),
        "mlp.linear_fc2.weight": both("mlp.linear_fc2.weight"),
    }
    return {f"decoder.layers.{name}": tensor for name, tensor in layers.items()} | {
        "embedding.word_embeddings.weight": padded("embedding.word_embeddings.weight"),
        "decoder.final_layernorm.weight": OURS["decoder.final_layernorm.weight"],
        "output_layer.weight": padded("output_layer.weight"),
    }


def cut(name, tensor, tp):
    """Return pieces of one layer and one of `tp` ranks each, as Megatron's modules are split."""
    if not name.startswith("decoder.layers."):
        return [Shard.whole(name, tensor)]
    axis = 2 if "linear_proj" in name or "linear_fc2" in name else 1
    ranks = 1 if "norm" in name else tp * (2 if "linear_fc1" in name else 1)
    shards = []
    for layer in range(tensor.shape[0]):
        start = 0
        for part in tensor[layer : layer + 1].chunk(ranks, dim=axis):
            offset = [layer, *(0 for _ in tensor.shape[1:])]
            offset[axis] = start
            shards.append(Shard(name, part, tuple(tensor.shape), tuple(offset)))
            start += part.shape[axis]
    return shards


def arguments(**changes):
    return argparse.Namespace(**{**vars(arguments_of(CONFIG, Padding(divisible_by=64))), **changes})


def write(folder, tensors=None, *, args=None, tp=1, common=None):
    """Write a sharded folder of these tensors (None: all of them) with these arguments (None: those
    that go with it)."""
    tensors = stacked() if tensors is None else tensors
    shards = [shard for name, tensor in tensors.items() for shard in cut(name, tensor, tp)]
    folder.mkdir(parents=True)
    plan = ShardWrite(folder, shards, alone=True, objects={"rng_state/shard_0_1": b"never read"})
    plan.finish([plan.write()], common_state(args or arguments()) if common is None else common)
    return folder


def numbered():
    """Return the tensors with a number for each layer, and gate and up by themselves."""
    tensors = {}
    for key, tensor in stacked().items():
        rest = key.removeprefix("decoder.layers.")
        if rest == key:
            tensors[key] = tensor
            continue
        for layer, one in enumerate(tensor):
            if rest == "mlp.linear_fc1.weight":
                for letter, part in zip("wv", one.chunk(2), strict=True):
                    tensors[f"decoder.layers.{layer}.{rest}_{letter}"] = part
            else:
                tensors[f"decoder.layers.{layer}.{rest}"] = one
    return tensors


def is_ours(folder):
    found = load.open_weights(folder)
    assert found.keys() == OURS.keys()
    return all(
        found[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in OURS.items()
    )


def refused(tmp_path, message, error=ConversionError, **options):
    """The import of tmp_path/m raises one error, and leaves nothing."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message):
        from_megatron(tmp_path / "m", tmp_path / "ckpt", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("tp", [1, 2])
def test_stacks_of_any_layout_come_back_to_the_byte(tmp_path, tp):
    write(tmp_path / "m", tp=tp)
    assert from_megatron(tmp_path / "m", tmp_path / "ckpt", workers=2) == CONFIG
    assert is_ours(tmp_path / "ckpt")
    assert load.read_manifest(tmp_path / "ckpt").kind == "teacher"


def test_layers_by_number_with_gate_and_up_apart_come_back(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    shards = [Shard.whole(name, tensor) for name, tensor in numbered().items()]
    plan = ShardWrite(folder, shards, alone=True)
    plan.finish([plan.write()], common_state(arguments()))
    from_megatron(folder, tmp_path / "ckpt")
    assert is_ours(tmp_path / "ckpt")


def test_a_tied_head_and_another_dtype(tmp_path):
    tensors = stacked()
    del tensors["output_layer.weight"]
    write(tmp_path / "m", tensors, args=arguments(untie_embeddings_and_output_weights=False))
    config = from_megatron(tmp_path / "m", tmp_path / "ckpt", dtype="bfloat16")
    assert config == CONFIG.replace(share_embeddings_and_output_weights=True)
    found = load.open_weights(tmp_path / "ckpt")
    assert all(torch.equal(found[key], OURS[key].bfloat16()) for key in found)


def test_optimizer_tensors_are_left_out_and_said(tmp_path):
    moments = {"optimizer.state.exp_avg.decoder.x": torch.ones(3)}
    write(tmp_path / "m", stacked() | moments)
    assert plan_from_megatron(tmp_path / "m").notes == [
        "1 tensors of the optimizer are not converted",
        "a Megatron checkpoint has no tokenizer and no token ids; --hf HF_DIR brings them",
    ]


def hugging_face(folder, config=CONFIG, **changes):
    folder.mkdir()
    raw = hf_config.hf_config_from_model(config.replace(**changes), torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


def test_a_hugging_face_folder_says_what_is_missing(tmp_path):
    hf = hugging_face(tmp_path / "hf", eos_token_id=2)
    write(tmp_path / "m", common={})
    refused(tmp_path, "how many tokens the vocabulary has; give --hf HF_DIR")
    refused(tmp_path, "stores no arguments .*; give --hf HF_DIR", vocab_size=61)
    config = from_megatron(tmp_path / "m", tmp_path / "ckpt", hf_dir=hf)
    assert config == CONFIG.replace(eos_token_id=2) and is_ours(tmp_path / "ckpt")
    tokenizer = load.tokenizer_dir(tmp_path / "ckpt")
    assert (tokenizer / "tokenizer.json").read_text() == TOKENIZER
    assert load.read_manifest(tmp_path / "ckpt").hf_config["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_hidden_size": 48}, "ffn_hidden_size is 40 in the tensors and 48 in config.json"),
        ({"vocab_size": 65}, "65 tokens is asked for, but its embedding has 64 rows"),
        ({"rotary_base": 5e5}, "rotary_base = 10000, but the model has 500000.0"),
    ],
)
def test_a_hugging_face_folder_of_another_model_is_refused(tmp_path, changes, message):
    write(tmp_path / "m")
    refused(tmp_path, message, hf_dir=hugging_face(tmp_path / "hf", **changes))


def test_a_students_hugging_face_folder_is_refused(tmp_path):
    write(tmp_path / "m")
    hf = hugging_face(tmp_path / "hf", tiny_model_config())
    refused(tmp_path, "describes a HypeNet student", hf_dir=hf)
    (hf / "config.json").write_text('{"model_type": "mistral"}')
    refused(tmp_path, "model_type 'mistral'", ConfigError, hf_dir=hf)


def test_the_folder_of_a_llama_is_refused_by_name(tmp_path):
    write(tmp_path / "m")
    hf = hugging_face(tmp_path / "hf", qk_layernorm=False)
    refused(tmp_path, "a teacher with qk_layernorm=False: to-megatron and from-meg", hf_dir=hf)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"vocab_size": None}, {}, r"embedding has 64 rows, .*--vocab-size N \(64 if there is no"),
        ({"vocab_size": 70}, {}, "which does not give the 64 rows"),
        ({}, {"vocab_size": 65}, "65 tokens is asked for, but its embedding has 64 rows"),
        ({"rotary_base": None}, {}, "its arguments lack rotary_base"),
        ({"norm_epsilon": "1e-6"}, {}, "its arguments lack norm_epsilon"),
        ({"rotary_base": -1}, {}, "describe no model: rotary_base"),
        ({"rotary_base": 10**600}, {}, "describe no model: rotary_base"),
        ({"norm_epsilon": float("nan")}, {}, "describe no model: layernorm_epsilon"),
        ({"num_experts": 8, "swiglu": False}, {}, r"2 argument\(s\) .*\n.*swiglu = False"),
    ],
)
def test_arguments_that_do_not_do_are_refused(tmp_path, changes, options, message):
    write(tmp_path / "m", args=arguments(**changes))
    refused(tmp_path, f"(?s){message}", **options)


def test_a_vocabulary_is_taken_from_the_command(tmp_path):
    write(tmp_path / "m", args=arguments(vocab_size=None))
    assert from_megatron(tmp_path / "m", tmp_path / "ckpt", vocab_size=61) == CONFIG
    hf = hugging_face(tmp_path / "hf")
    with pytest.raises(ConversionError, match="--vocab-size 60, but config.json says"):
        plan_from_megatron(tmp_path / "m", hf_dir=hf, vocab_size=60)


QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
HEAD = "output_layer.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QKV), f"layers.0.{QKV[15:]} is missing"),
        (lambda t: t.pop("decoder.final_layernorm.weight"), "1 of 19 tensors are missing"),
        (lambda t: t.update({FC1: t[FC1][:1]}), "missing: decoder.layers.1.mlp.linear_fc1"),
        (lambda t: t.update({QKV[:-6] + "bias": torch.zeros(2, 96)}), "linear_qkv.bias"),
        (lambda t: t.update({QKV: torch.zeros(2, 97, 24)}), "do not fit heads of 8 channels"),
        (lambda t: t.update({FC1: torch.zeros(2, 81, 24)}), r"shape \[81, 24\], .* \[80, 24\]"),
        (lambda t: t.update({HEAD: torch.zeros(80, 24)}), r"output_layer.weight has shape \[80"),
        (lambda t: t[QKV].view(-1)[7:8].fill_(torch.inf), "1 of 2304 values that are NaN"),
        (lambda t: t.update(other=torch.zeros(2)), "none of a dense Qwen3: other"),
    ],
)
def test_other_tensors_are_refused(tmp_path, change, message):
    tensors = {name: tensor.clone() for name, tensor in stacked().items()}
    change(tensors)
    write(tmp_path / "m", tensors)
    refused(tmp_path, message)


def test_shapes_of_no_model_are_refused_before_rows_are_counted(tmp_path):
    """65,536 groups of two channels in a layer, and the name of a layer 9,999."""
    tensors = {
        "embedding.word_embeddings.weight": torch.zeros(2, 1),
        "decoder.layers.0.self_attention.q_layernorm.weight": torch.zeros(2),
        "decoder.layers.0.self_attention.linear_proj.weight": torch.zeros(1, 2 << 16),
        "decoder.layers.0.self_attention.linear_qkv.weight": torch.zeros(6 << 16, 1),
        "decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(2, 1),
        "decoder.layers.9999.mlp.linear_fc1.weight": torch.zeros(2, 1),
    }
    (tmp_path / "m").mkdir()
    shards = [Shard.whole(name, tensor) for name, tensor in tensors.items()]
    plan = ShardWrite(tmp_path / "m", shards, alone=True)
    plan.finish([plan.write()], common_state(arguments()))
    refused(tmp_path, "65,536 groups in 10,000 layers, more than any model")


def test_the_save_that_the_tracker_names_is_found(tmp_path):
    save_7 = write(tmp_path / "m" / "iter_0000007")
    tracker = tmp_path / "m" / "latest_checkpointed_iteration.txt"
    refused(tmp_path, "neither .metadata .* nor latest_checkpointed_iteration.txt")
    for text in ("7", "7\n"):
        tracker.write_text(text)
        assert find_sharded(tmp_path / "m") == save_7 == find_sharded(save_7)
    shutil.copytree(save_7, tmp_path / "m" / "release")
    tracker.write_text("release")
    assert find_sharded(tmp_path / "m").name == "release"
    for text, message in (
        ("../7", "holds '../7', neither a number nor"),
        ("9" * 70000, "larger than"),
        ("8", "iter_0000008, .* is no torch_dist checkpoint"),
    ):
        tracker.write_text(text)
        refused(tmp_path, message)
    (tmp_path / "m" / "iter_0000008").symlink_to(tmp_path)
    refused(tmp_path, "leads out of the folder")
    with pytest.raises(ConversionError, match="is not a folder"):
        find_sharded(tracker.with_name("missing"))


def damage_index(folder):
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-20])


def damage_backend(folder):
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def remove_backend(folder):
    (folder / "metadata.json").unlink()


def shorten(folder):
    os.truncate(folder / "__0_0.distcp", 20000)


def lead_out(folder):
    (folder / "__0_0.distcp").rename(folder.with_name("elsewhere"))
    (folder / "__0_0.distcp").symlink_to(folder.with_name("elsewhere"))


def pipe(folder):
    (folder / "common.pt").unlink()
    os.mkfifo(folder / "common.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, "pickle in it is damaged"),
        (damage_backend, "sharded_backend is 'zarr'"),
        (remove_backend, r"metadata\.json: no such file"),
        (shorten, r"__0_0\.distcp \(20,000 bytes\) does not have"),
        (lead_out, "symbolic link that leads out"),
        (pipe, "not a regular file"),
    ],
)
def test_damage_is_one_error(tmp_path, damage, message):
    damage(write(tmp_path / "m"))
    refused(tmp_path, message, (ConversionError, CheckpointError))


def test_what_is_at_the_destination_is_kept(tmp_path):
    write(tmp_path / "m")
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="already exists"):
        from_megatron(tmp_path / "m", tmp_path / "ckpt")
    with pytest.raises(ConversionError, match="is not a checkpoint, so it is not replaced"):
        from_megatron(tmp_path / "m", tmp_path / "ckpt", overwrite=True)
    shutil.rmtree(tmp_path / "ckpt")
    save.write_weights(tmp_path / "ckpt", {"x": torch.ones(1)}, CONFIG, kind="teacher")
    from_megatron(tmp_path / "m", tmp_path / "ckpt", overwrite=True)
    assert is_ours(tmp_path / "ckpt")
