"""A run folder continues its own run and refuses another one."""

import json

import pytest

from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.engine.run_folder import RunFolder, difference, files_identity, fingerprint_of, settled, write_json
from megatron_hypenet.errors import ConfigError, DataError, UsageError

STAGE = {"train_iters": 2, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1e-3, "min_lr": 1e-4}


def config(root, **changes):
    """A valid run configuration."""
    values = {"output_dir": root, "teacher": "teacher", "data": {"train": ["a.txt"]}, "align": STAGE, "distill": STAGE, "finetune": STAGE}
    return RunConfig.model_validate({**values, **changes})


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_a_new_folder_gets_the_resolved_configuration(folder):
    from megatron_hypenet.config.loader import load_run_config

    run = config(folder.root)
    folder.prepare(run)
    assert load_run_config(folder.config_file) == run


def test_the_same_configuration_continues(folder):
    folder.prepare(config(folder.root))
    (folder.root / "result").touch()
    folder.prepare(config(folder.root))
    assert (folder.root / "result").exists()


def test_other_settings_are_refused_by_name(folder):
    folder.prepare(config(folder.root))
    with pytest.raises(ConfigError) as caught:
        folder.prepare(config(folder.root, seed=7, align={**STAGE, "lr": 5e-3}))
    assert "seed: 1234 there, 7 now" in str(caught.value)
    assert "align.lr: 0.001 there, 0.005 now" in str(caught.value)
    assert "--overwrite" in str(caught.value) and caught.value.exit_code == 3
    assert "distill" not in str(caught.value)


def test_settings_of_layout_and_logging_may_change(folder, tmp_path):
    folder.prepare(config(folder.root))
    faster = {**STAGE, "micro_batch_size": 2, "log_interval": 1, "save_interval": 3}
    folder.prepare(config(folder.root, align=faster, parallel={"zero_stage": 2}, checkpoint={"keep_last": 5}, device="cpu"))


def test_overwrite_deletes_the_old_run(folder):
    folder.prepare(config(folder.root))
    (folder.root / "result").touch()
    folder.prepare(config(folder.root, seed=7), overwrite=True)
    assert not (folder.root / "result").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(folder, overwrite):
    folder.root.mkdir()
    (folder.root / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not a run folder"):
        folder.prepare(config(folder.root), overwrite=overwrite)
    assert (folder.root / "thesis.tex").exists()


def test_a_step_is_done_with_its_fingerprint_and_results_only(folder, tmp_path):
    result = tmp_path / "result"
    assert not folder.is_done("align", "f1", [result])
    folder.begin("align", "f1")
    assert folder.started("align") == "f1" and folder.started("distill") is None
    assert not folder.is_done("align", "f1", [])
    folder.record("align", "f1", seconds=1.5, software={}, checkpoint="iter_0000002")
    assert folder.is_done("align", "f1", []) and not folder.is_done("align", "f2", [])
    assert not folder.is_done("align", "f1", [result])
    result.touch()
    assert folder.is_done("align", "f1", [result])
    assert folder.records()["align"]["checkpoint"] == "iter_0000002"
    folder.begin("align", "f2")
    assert not folder.is_done("align", "f1", [result])


def test_a_damaged_record_says_what_to_do(folder):
    folder.root.mkdir()
    folder.manifest_file.write_text("{")
    with pytest.raises(DataError, match="delete it to run every step again"):
        folder.records()


def test_difference_sees_new_and_lost_keys():
    assert difference({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "d": [1]}) == ["a: 1 there, not set now", "d: not set there, [1] now"]


def test_settled_leaves_out_what_may_change():
    assert settled({"align": STAGE, "parallel": {"zero_stage": 1}}) == {
        f"align.{key}": value for key, value in STAGE.items() if key != "micro_batch_size"
    }


def test_identity_follows_content_not_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"x" * 3_000_000)
    first = files_identity(tmp_path / "a")
    assert first == files_identity(tmp_path / "b")
    with (tmp_path / "b" / "weights").open("r+b") as stream:
        stream.seek(2_999_999)
        stream.write(b"y")
    assert files_identity(tmp_path / "b") != first
    assert fingerprint_of({"files": first}) != fingerprint_of({"files": files_identity(tmp_path / "b")})
    assert files_identity(tmp_path / "none") == []


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="file is a file, not a folder; choose another output_dir"):
            RunFolder(root).prepare(config(root))
