"""Finding a checkpoint and its shape."""

import logging
import os
import shutil

import pytest

from megatron_hypenet.checkpoint import find, save
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.errors import CheckpointError
from tests.processes import loaded_by
from tests.reseal import reseal


def test_resolve_takes_the_newest_of_a_run(run):
    assert find.resolve(run).name == find.resolve(run / "checkpoints").name == "iter_0000020"
    assert find.resolve(run / "checkpoints" / "iter_0000010").name == "iter_0000010"


@pytest.mark.parametrize("damage", ["uncommitted", "missing", "short"])
def test_resolve_falls_back_and_says_so(run, damage, caplog):
    newest = run / "checkpoints" / "iter_0000020"
    data = next(newest.rglob("*.distcp"))
    match damage:
        case "uncommitted":
            (newest / fmt.COMMITTED).unlink()
        case "missing":
            data.unlink()
        case "short":
            data.write_bytes(data.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert find.resolve(run).name == "iter_0000010"
    assert "iter_0000020 is skipped" in caplog.text
    shutil.rmtree(run / "checkpoints" / "iter_0000010")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find.resolve(run)


def test_what_a_stage_starts_from_is_the_newest_save_or_none(run):
    next((run / "checkpoints" / "iter_0000020").rglob("*.distcp")).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="iter_0000020, the newest save .* cannot be used: damaged: .*0 bytes"
    ):
        find.resolve(run, fall_back=False)
    assert (
        find.resolve(run / "checkpoints" / "iter_0000010", fall_back=False).name == "iter_0000010"
    )


def test_a_tokenizer_is_handed_out_as_it_was_written(tmp_path, tensors, model_config):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    folder = save.write_weights(
        tmp_path / "ck", tensors, model_config, kind="teacher", tokenizer_dir=tmp_path / "tokenizer"
    )
    assert find.tokenizer_dir(folder) == folder / "tokenizer"
    (folder / "tokenizer" / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(CheckpointError, match="tokenizer/tokenizer.json: sha256 differs"):
        find.tokenizer_dir(folder)


def test_resolve_explains_what_the_path_is(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find.resolve(tmp_path / "none")
    with pytest.raises(CheckpointError, match="neither"):
        find.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert import"):
        find.resolve(tmp_path)


def test_a_damaged_model_json_is_a_damaged_checkpoint(tmp_path, tensors, model_config):
    folder = save.write_weights(tmp_path / "ck", tensors, model_config, kind="teacher")
    (folder / "model.json").write_text("{bad")
    with pytest.raises(
        CheckpointError, match="model.json: differs from what manifest.json says.*damaged"
    ):
        find.read_model_config(folder)
    for text in ("{bad", "[]", "[" * 100_000, '{"num_layers": "3"}'):
        (folder / "model.json").write_text(text)
        with pytest.raises(CheckpointError, match="model.json: .*the checkpoint is damaged"):
            find.read_model_config(reseal(folder, "model.json"))


def test_a_stage_is_finished_by_a_checkpoint_of_all_its_steps_that_is_whole(
    tmp_path, tensors, model_config, caplog
):
    for step in (2, 6):
        save.write_weights(
            tmp_path / "checkpoints" / fmt.iteration_name(step), tensors, model_config, kind="align"
        )
    last = tmp_path / "checkpoints" / "iter_0000006"
    assert find.finished_checkpoint(tmp_path, 6) == last
    assert find.finished_checkpoint(tmp_path, 7) is None
    for file in (path for path in last.rglob("*") if path.is_file()):
        os.truncate(file, 0)
    assert find.finished_checkpoint(tmp_path, 6) is None
    assert f"{last} cannot be used" in caplog.text
    assert find.finished_checkpoint(tmp_path / "none", 6) is None


def test_no_tensor_library_is_imported():
    assert loaded_by("import megatron_hypenet.checkpoint.find", ("torch", "numpy")) == []
