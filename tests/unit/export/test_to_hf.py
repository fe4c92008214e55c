import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_hypenet.checkpoint import save, stream
from megatron_hypenet.errors import CheckpointError, ConfigError, ConversionError, SetupError
from megatron_hypenet.export import hf_config, mapping
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.hf_remote.mixers_hypenet import MIXERS
from megatron_hypenet.export.remote_code import remote_files
from megatron_hypenet.export.tensors import join
from megatron_hypenet.export.to_hf import export_hf

from .conftest import TOKENIZER


@pytest.fixture
def imported(hf_model, tmp_path):
    """import(**changes) -> (HfModel, checkpoint folder); the HF folder is gone, as for a user who
    moved the checkpoint."""

    def run(**changes):
        model = hf_model(**changes)
        model.files = {
            "tokenizer.json": TOKENIZER,
            "generation_config.json": '{"top_p": 0.9, "transformers_version": "4.57.1"}',
        }
        import_hf(model.write(tmp_path / "source"), tmp_path / "ckpt")
        shutil.rmtree(tmp_path / "source")
        return model, tmp_path / "ckpt"

    return run


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_equal(imported, tmp_path, student, tied):
    model, ckpt = imported(student=student, share_embeddings_and_output_weights=tied)
    assert export_hf(ckpt, tmp_path / "hf") == model.model
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == model.tensors.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in model.tensors.items()
    )
    assert json.loads((tmp_path / "hf/config.json").read_text()) == model.config
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("hf_name", sorted({mixer.hf_names[0] for mixer in MIXERS.values()}))
def test_folder_of_a_student_carries_its_code(imported, tmp_path, hf_name):
    mixer = hf_config.mixer_spellings()[hf_name]
    _, ckpt = imported(student=True, mixer_types=(mixer, "attn", mixer))
    export_hf(ckpt, tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        *remote_files({"attn", hf_name}),
    }
    for module in json.loads((tmp_path / "hf/config.json").read_text())["auto_map"].values():
        assert f"{module.split('.')[0]}.py" in names


def test_folder_of_a_teacher_needs_no_code(imported, tmp_path):
    _, ckpt = imported()
    export_hf(ckpt, tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {
        "eos_token_id": 2,
        "top_p": 0.9,
    }


def test_shards_and_index(imported, tmp_path):
    model, ckpt = imported(student=True)
    lines = []
    export_hf(ckpt, tmp_path / "hf", max_shard_bytes=12_000, progress=lines.append)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert (
        len(files) > 2
        and files == sorted(set(index["weight_map"].values()))
        and len(lines) == len(files)
    )
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in model.tensors.values()
    )
    for file in files:
        found = load_file(tmp_path / "hf" / file)
        assert {
            name for name, where in index["weight_map"].items() if where == file
        } == found.keys()
        assert all(torch.equal(tensor, model.tensors[name]) for name, tensor in found.items())


def test_weights_are_as_readable_as_the_rest(imported, tmp_path):
    _, ckpt = imported()
    export_hf(ckpt, tmp_path / "hf")
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1


def test_dtype_is_converted(imported, tmp_path):
    model, ckpt = imported()
    export_hf(ckpt, tmp_path / "hf", dtype="bfloat16")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert all(
        torch.equal(tensor, model.tensors[name].bfloat16()) for name, tensor in found.items()
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("asked", "written"), [("keep", "hype 362"), ("hype 500", "hype 500"), (None, None), (2, 2.0)]
)
def test_logits_scaling_is_written(imported, tmp_path, asked, written):
    _, ckpt = imported(student=True, attn_logits_scaling="hype 362")
    export_hf(ckpt, tmp_path / "hf", attn_logits_scaling=asked)
    assert json.loads((tmp_path / "hf/config.json").read_text())["attn_logits_scaling"] == written


def test_logits_scaling_that_makes_no_sense(imported, tmp_path):
    _, ckpt = imported(student=True)
    with pytest.raises(ConfigError, match="needs a > 1"):
        export_hf(ckpt, tmp_path / "hf", attn_logits_scaling="hype 1")
    assert not (tmp_path / "hf").exists()


def test_a_teacher_has_no_logits_scaling(imported, tmp_path):
    _, ckpt = imported()
    with pytest.raises(ConfigError, match="asked for a teacher"):
        export_hf(ckpt, tmp_path / "hf", attn_logits_scaling="hype 500")


def write_checkpoint(model, folder, change):
    tensors = {
        entry.ours: join(entry, [model.tensors[name] for name in entry.hf]).clone()
        for entry in mapping.entries(model.model)
    }
    change(tensors)
    return save.write_weights(folder, tensors, model.model, kind="student")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("decoder.final_layernorm.weight"),
            "1 of 37 tensors are missing, first decoder.final_layernorm.weight",
        ),
        (lambda t: t.update(extra=torch.zeros(2)), "1 tensors do not belong.*first extra"),
        (
            lambda t: t["decoder.final_layernorm.weight"].fill_(torch.nan),
            "decoder.final_layernorm.weight has 32 of 32 values",
        ),
        (
            lambda t: t.update({"decoder.final_layernorm.weight": torch.zeros(9)}),
            r"has shape \[9\], the configuration asks for \[32\]",
        ),
    ],
)
def test_bad_checkpoints_leave_nothing(hf_model, tmp_path, change, message):
    write_checkpoint(hf_model(student=True), tmp_path / "ckpt", change)
    with pytest.raises(ConversionError, match=message):
        export_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_checkpoint_without_origin_exports_too(hf_model, tmp_path):
    model = hf_model(student=True)
    write_checkpoint(model, tmp_path / "ckpt", lambda tensors: None)
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text()) == model.config


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        export_hf(tmp_path / "nothing", tmp_path / "hf")


def test_existing_destination(imported, tmp_path):
    _, ckpt = imported()
    export_hf(ckpt, tmp_path / "hf")
    with pytest.raises(ConversionError, match="already exists"):
        export_hf(ckpt, tmp_path / "hf")
    export_hf(ckpt, tmp_path / "hf", overwrite=True, dtype="bfloat16")
    assert load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    with pytest.raises(ConversionError, match="not a Hugging Face folder"):
        export_hf(ckpt, ckpt, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_a_flipped_byte_is_noticed(imported, tmp_path):
    _, ckpt = imported()
    shard = next((ckpt / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name}: sha256 differs from the manifest"):
        export_hf(ckpt, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_leaves_nothing(imported, tmp_path, monkeypatch):
    _, ckpt = imported()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "pwrite", full)
    with pytest.raises(SetupError, match="no space left on the disk"):
        export_hf(ckpt, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
