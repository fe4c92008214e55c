import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hypenet.checkpoint.find import resolve
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import CheckpointError, ConversionError
from megatron_hypenet.export import hf_model
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.model.hypenet import build_model
from tests.tiny import tiny_model_config, whole_tensors

CONFIG = tiny_model_config(attn_logits_scaling="hype 5", num_query_groups=2, vocab_size=62)


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, ParallelConfig(), dtype=torch.float32, seed=3)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "finetune"
    save = folder / "checkpoints" / "iter_0000001"
    save.parent.mkdir(parents=True)
    (folder.parent / "config.yaml").touch()
    write_weights(save, whole_tensors(model), model.model_config, kind="student")
    return folder


@torch.no_grad()
def test_a_checkpoint_runs_through_a_temporary_folder(model, checkpoint):
    ids = torch.randint(62, (2, 9), generator=torch.Generator().manual_seed(0))
    with hf_model.as_hf_folder(checkpoint.parent) as folder:
        config = hf_model.read_config(folder)
        loaded = hf_model.load_model(folder, config, "float32", "cpu")
        assert hf_model.load_model(folder, config, None, "cpu").dtype == torch.float32
    assert not folder.exists()
    torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=1e-4, atol=1e-5)


def test_a_run_means_its_export_or_the_stage_trained_last(checkpoint, tmp_path):
    run = checkpoint.parent
    assert hf_model.meant(run) == run and hf_model.meant(checkpoint) == checkpoint
    assert resolve(run) == resolve(checkpoint) == checkpoint / "checkpoints" / "iter_0000001"
    export_hf(checkpoint, tmp_path / "run" / "export")
    (tmp_path / "run" / "finetune" / "checkpoints").mkdir(parents=True)
    assert hf_model.meant(tmp_path / "run") == tmp_path / "run" / "export"
    with hf_model.as_hf_folder(tmp_path / "run") as folder:
        assert folder == tmp_path / "run" / "export"
    assert folder.exists()


def test_what_is_neither_is_named(tmp_path):
    with (
        pytest.raises(CheckpointError, match="does not exist"),
        hf_model.as_hf_folder(tmp_path / "no"),
    ):
        pass


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_wrong_settings(folder):
    (folder / "generation_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_off, "not a complete safetensors file"),
        (without_a_tensor, "1 of .* tensors are missing, first model.norm.weight"),
        (pickled, "no model.safetensors .*, only pytorch_model.bin; only safetensors are read"),
        (with_wrong_settings, "generation_config.json: expected an object"),
    ],
)
def test_a_damaged_folder_is_refused_before_it_runs(checkpoint, tmp_path, damage, says):
    folder = tmp_path / "folder"
    export_hf(checkpoint, folder)
    assert hf_model.read_config(folder)
    damage(folder)
    with pytest.raises(ConversionError, match=says):
        hf_model.read_config(folder)


def test_what_transformers_cannot_read_is_named(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    export_hf(checkpoint, folder)
    config = hf_model.read_config(folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    with pytest.raises(ConversionError, match="transformers cannot load it"):
        hf_model.load_model(folder, config, "float32", "cpu")
