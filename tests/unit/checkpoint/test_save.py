"""write_weights: one process, whole tensors, one committed folder."""

import pytest
import torch

from megatron_hypenet.checkpoint import load, save, shard_writer
from megatron_hypenet.checkpoint.shards import LazyTensor
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.errors import CheckpointError, SetupError


def test_writes_everything_a_reader_needs(tmp_path, tensors, model_config):
    (tmp_path / "tok").mkdir(mode=0o700)
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    folder = save.write_weights(
        tmp_path / "ck",
        tensors,
        model_config,
        kind="teacher",
        tokenizer_dir=tmp_path / "tok",
        extra={"hf_config": {"model_type": "qwen3"}},
    )
    assert load.read_model_config(folder) == model_config
    assert (load.tokenizer_dir(folder) / "tokenizer.json").read_text() == "{}"
    # who may read the weights may read the tokenizer, which came from a private folder
    assert (folder / "tokenizer").stat().st_mode == (folder / "weights").stat().st_mode
    assert load.read_manifest(folder).hf_config == {"model_type": "qwen3"}
    assert str(tmp_path).encode() not in b"".join(
        path.read_bytes() for path in folder.rglob("*") if path.is_file()
    )
    got = load.read_weights(folder)
    assert all(torch.equal(got[key], tensors[key]) for key in tensors)


def test_same_tensors_give_the_same_files(tmp_path, tensors, model_config):
    first, second = (
        load.read_manifest(
            save.write_weights(tmp_path / name, tensors, model_config, kind="t")
        ).files
        for name in "ab"
    )
    assert first == second


def test_a_tensor_that_fails_halfway_leaves_nothing(tmp_path, tensors, model_config):
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(SetupError, match="no space left"):
        save.write_weights(
            tmp_path / "ck",
            {**tensors, "z": LazyTensor((2,), torch.float32, fail)},
            model_config,
            kind="teacher",
        )
    assert list(tmp_path.iterdir()) == []


def test_refuses_empty_missing_tokenizer_and_existing(tmp_path, tensors, model_config):
    with pytest.raises(CheckpointError, match="no tensors"):
        save.write_weights(tmp_path / "ck", {}, model_config, kind="teacher")
    with pytest.raises(CheckpointError, match="tokenizer folder"):
        save.write_weights(
            tmp_path / "ck",
            tensors,
            model_config,
            kind="teacher",
            tokenizer_dir=tmp_path / "nowhere",
        )
    save.write_weights(tmp_path / "ck", tensors, model_config, kind="teacher")
    with pytest.raises(CheckpointError, match="already exists"):
        save.write_weights(tmp_path / "ck", tensors, model_config, kind="teacher")
    save.write_weights(tmp_path / "ck", tensors, model_config, kind="student", overwrite=True)
    assert load.read_manifest(tmp_path / "ck").kind == "student"


def training_folder(folder, engine, model_config, **changes):
    state = TrainState(stage="distill", step=7, samples=56, adam_step=engine.adam_step())
    arguments = {
        "model_config": model_config,
        "kind": "student",
        "config_yaml": "a: 1\n",
        "extra": {"run": "x"},
    }
    return save.begin_save(folder, engine, state, **{**arguments, **changes}).commit()


def test_training_save_is_complete_and_hashed(tmp_path, make_engine, model_config):
    folder = training_folder(tmp_path / "iter_0000007", make_engine().randomize(0), model_config)
    manifest = load.verify_files(folder, hashes=True)
    assert (manifest.kind, manifest.stage, manifest.extra) == (
        "student",
        "distill",
        {"step": 7, "run": "x"},
    )
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == names - {"manifest.json", "COMMITTED"}
    assert {"train_state.json", "rng.safetensors", "config.yaml", "model.json"} <= names
    assert set(load.read_weights(folder)) == {
        "embed.weight",
        "linear.weight.q",
        "linear.weight.k",
        "norm.weight",
    }


@pytest.mark.parametrize("where", ["write", "finish"])
def test_full_disk_removes_the_save_and_keeps_the_old_one(
    tmp_path, make_engine, model_config, monkeypatch, where
):
    engine = make_engine().randomize(0)
    old = training_folder(tmp_path / "iter_0000006", engine, model_config)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer.ShardWrite, where, full)
    with pytest.raises(
        SetupError, match="no space left.*older checkpoints are untouched"
    ) as caught:
        training_folder(tmp_path / "iter_0000007", engine, model_config)
    assert caught.value.exit_code == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["iter_0000006"]
    load.verify_files(old, hashes=True)


def test_background_save_is_the_same_bytes(tmp_path, make_engine, model_config):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    engine = make_engine().randomize(0)
    straight = training_folder(tmp_path / "a", engine, model_config, tokenizer_dir=tmp_path / "tok")
    state = TrainState(stage="distill", step=7, samples=56, adam_step=engine.adam_step())
    options = {
        "model_config": model_config,
        "kind": "student",
        "config_yaml": "a: 1\n",
        "extra": {"run": "x"},
    }
    pending = save.begin_save(
        tmp_path / "b", engine, state, **options, tokenizer_dir=tmp_path / "tok", background=True
    )
    engine.randomize(1)  # training goes on: the copies were taken at the request
    assert not (tmp_path / "b").exists()
    background = pending.commit()
    first, second = (load.verify_files(folder, hashes=True) for folder in (straight, background))
    assert first.files == second.files and "tokenizer/tokenizer.json" in first.files
    assert (first.kind, first.stage, first.extra) == (second.kind, second.stage, second.extra)


def test_a_failure_of_the_request_leaves_nothing(tmp_path, make_engine, model_config):
    engine = make_engine()
    engine.randomize(0).states.clear()  # full_state fails
    with pytest.raises(KeyError):
        training_folder(tmp_path / "run" / "iter_0000007", engine, model_config)
    assert list((tmp_path / "run").iterdir()) == []
