"""A run folder continues its own run and refuses another one."""

import json
from dataclasses import replace

import pytest
import yaml

from megatron_hypenet import ownership
from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.errors import ConfigError, DataError, UsageError
from megatron_hypenet.halo.fingerprints import FORM
from megatron_hypenet.halo.run_folder import RunFolder

STAGE = {
    "train_iters": 2,
    "seq_length": 8,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "lr": 1e-3,
    "min_lr": 1e-4,
}


def config(root, **changes):
    """Return a valid run configuration."""
    values = {
        "output_dir": root,
        "teacher": "teacher",
        "data": {"train": ["a.txt"]},
        "align": STAGE,
        "distill": STAGE,
        "finetune": STAGE,
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_a_new_folder_gets_the_resolved_configuration(folder):
    run = config(folder.root)
    folder.prepare(run)
    assert load_run_config(folder.config_file) == run


def test_the_same_configuration_continues(folder):
    folder.prepare(config(folder.root))
    (folder.root / "result").touch()
    folder.prepare(config(folder.root))
    assert (folder.root / "result").exists()


def test_other_settings_are_written(folder):
    """The run folder takes them: whether they may change is checked before (test_changes.py)."""
    folder.prepare(config(folder.root))
    folder.prepare(config(folder.root, seed=7))
    assert load_run_config(folder.config_file).seed == 7


def written_by_an_older_version(folder, *unknown):
    """Return a run folder as a version wrote it that did not know the settings `unknown`."""
    folder.prepare(config(folder.root))
    stored = yaml.safe_load(folder.config_file.read_text())
    for key in unknown:
        *sections, name = key.split(".")
        section = stored
        for part in sections:
            section = section[part]
        del section[name]
    folder.config_file.write_text(yaml.safe_dump(stored))
    return stored


@pytest.mark.parametrize(
    "unknown", ["align.weight_decay", "data.separate_documents", "precision", "eval"]
)
def test_a_setting_that_came_later_counts_as_set_to_its_default(folder, unknown):
    written_by_an_older_version(folder, unknown)
    folder.check_known(config(folder.root))
    added = folder.added_settings(config(folder.root))
    assert added and all(key == unknown or key.startswith(f"{unknown}.") for key in added)
    # noted when it first continues, and still known when config.yaml has it, too
    for _ in range(2):
        folder.prepare(config(folder.root))
        assert folder.added_settings(config(folder.root)) == added
    assert load_run_config(folder.config_file) == config(folder.root)


def test_a_new_folder_knows_every_setting(folder):
    assert folder.added_settings(config(folder.root)) == frozenset()
    folder.prepare(config(folder.root))
    folder.prepare(config(folder.root))
    assert (
        folder.added_settings(config(folder.root)) == frozenset()
        and not folder.manifest_file.exists()
    )
    folder.begin("align", "f1")
    written_by_an_older_version(folder, "precision")
    folder.prepare(config(folder.root))
    assert folder.started("align") == "f1"
    folder.prepare(config(folder.root), overwrite=True)
    assert folder.added_settings(config(folder.root)) == frozenset()


def test_a_setting_that_no_longer_exists_is_named_with_the_version_that_had_it(folder):
    folder.prepare(config(folder.root))
    with folder.config_file.open("a") as stream:
        stream.write("warp: 9\n")
    folder.record(
        "teacher",
        "f1",
        seconds=1.0,
        software={"versions": {"megatron-hypenet": "0.0.7"}, "git_commit": "abc"},
    )
    with pytest.raises(
        ConfigError,
        match=r"does not have:\n  - warp: 9\nContinue it .*megatron-hypenet 0\.0\.7, "
        r"commit abc.*--overwrite",
    ):
        folder.prepare(config(folder.root))
    folder.prepare(config(folder.root), overwrite=True)


@pytest.mark.parametrize("place", ["", "distill"])
def test_a_stop_file_that_is_there_is_a_mistake_of_who_starts(folder, place):
    folder.refuse_stop()
    (folder.root / place).mkdir(parents=True)
    stop = folder.root / place / "STOP"
    stop.touch()
    with pytest.raises(
        UsageError, match=f"{stop} asks for a stop, and it was there before this command; delete it"
    ):
        folder.refuse_stop()


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
        with folder.owned():
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


def test_the_form_of_fingerprints_is_noted_with_the_first(folder):
    folder.begin("align", "f1")
    assert folder.content()["fingerprints"] == FORM
    older = {"steps": {}, "started": {"align": "f1"}}
    folder.write(older)
    folder.begin("align", "f2")
    assert folder.content()["fingerprints"] == 1
    shown = replace(folder, manifest={"started": {"align": "f3"}})
    assert shown.started("align") == "f3" and folder.started("align") == "f2"


def test_a_damaged_record_says_what_to_do(folder):
    folder.root.mkdir()
    folder.manifest_file.write_text("{")
    with pytest.raises(DataError, match="delete it to run every step again"):
        folder.records()


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
        with pytest.raises(
            UsageError, match="file is a file, not a folder; choose another output_dir"
        ):
            with RunFolder(root).owned():
                RunFolder(root).prepare(config(root))


def test_the_owner_finds_no_leftovers_and_its_own_mark_counts_for_nothing(folder):
    folder.root.mkdir()
    (folder.root / ".config.yaml.tmp-3").write_text("a start that was killed")
    with folder.owned():
        assert [path.name for path in folder.root.iterdir()] == [ownership.FILE]
        folder.prepare(config(folder.root))
        (folder.root / "align" / "checkpoints" / ".iter_0000001.tmp-9").mkdir(parents=True)
        (folder.root / ".teacher.tmp-3").mkdir()
        (folder.root / ".plan.tmp-1").write_text("somebody's own")
    with folder.owned():
        folder.prepare(config(folder.root))
        left = {str(path.relative_to(folder.root)) for path in folder.root.rglob("*")}
        assert left == {ownership.FILE, "config.yaml", "align", "align/checkpoints", ".plan.tmp-1"}
        folder.prepare(config(folder.root), overwrite=True)
        assert {path.name for path in folder.root.iterdir()} == {ownership.FILE, "config.yaml"}
    assert not (folder.root / ownership.FILE).exists()


def test_a_second_owner_is_refused_and_an_empty_folder_does_not_stay(folder):
    with folder.owned():
        with (
            pytest.raises(UsageError, match="is in use by process"),
            RunFolder(folder.root.parent / "x" / ".." / "run").owned(),
        ):
            pass
    assert not folder.root.exists()
