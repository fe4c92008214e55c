"""A run folder of an older version goes on: its records are read as those of this one."""

import pytest
import yaml

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.config.loader import dump_config
from megatron_hypenet.errors import ConfigError
from megatron_hypenet.halo.changes import accept, changed
from megatron_hypenet.halo.fingerprints import FORM
from megatron_hypenet.halo.older_records import up_to_date
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner
from megatron_hypenet.halo.tasks import halo_steps
from tests.unit.halo.test_run_folder import STAGE, config

RECORDED = {
    "teacher": "4ed9c13a413a86289bfcaee9",
    "data": "1b46bf5736f5ae61f62cc35c",
    "probe": "a437e934a8f4cace4df808e6",
    "align": "f7764c8e00aeab4b65ddb320",
    "select": "3297144d664cbb8e530f5cce",
    "assemble": "bd2552d2381f4e969e1e9cf6",
    "distill": "85f7b5d61fc3d248d01b7cf7",
    "finetune": "ddc7b74b3ed7729a0bbbaf7d",
    "export": "12fd96f282c8251d98a18f65",
    "report": "f75f020b9ef6181f9e05300f",
}
"""What the version before this form of fingerprints recorded for the run of `older`."""


def wanted(**changes):
    """Return the configuration of that run."""
    values = {
        "teacher": "qwen3",
        "data": {"train": ["a.txt"], "heldout": "b.txt"},
        "guard": {"max_teacher_loss": 9.0},
    }
    return config("runs/x", **{**values, **changes})


@pytest.fixture
def older(tmp_path, monkeypatch):
    """Provide the finished folder of that run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3").mkdir()
    (tmp_path / "qwen3" / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "b.txt").write_text("held out\n")
    (tmp_path / "runs" / "x" / "selection").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "selection" / "mixers.json").write_text("{}")
    folder = RunFolder(wanted().output_dir)
    stored = yaml.safe_load(dump_config(wanted()))
    # which that version did not have
    for stage in ("align", "distill", "finetune"):
        for later in ("lr_decay_iters", "objective", "teacher_weight"):
            stored[stage].pop(later, None)
    del stored["select"]["method"], stored["select"]["gates"], stored["guard"]["max_fp8_kl"]
    del stored["fp8"], stored["model"]
    folder.config_file.write_text(yaml.safe_dump(stored))
    steps = {
        name: {"fingerprint": value, "seconds": 1.0, "finished": "2026-01-01T00:00:00+00:00"}
        for name, value in RECORDED.items()
    }
    write_json(folder.manifest_file, {"format_version": 1, "steps": steps, "started": RECORDED})
    return folder


def test_every_record_is_understood_and_nothing_is_written_by_looking(older):
    before = older.manifest_file.read_text()
    records = up_to_date(older, wanted())
    runner = Runner(wanted(), records, halo_steps(wanted(), records))
    for name in RECORDED:
        assert records.records()[name]["fingerprint"] == runner.fingerprint(name)
        # a folder's content has the form that it had
        assert (runner.fingerprint(name) == RECORDED[name]) == (name == "teacher")
        assert records.started(name) == runner.basis(name)
    assert changed(wanted(), older).again == () and older.manifest_file.read_text() == before


def test_files_that_moved_are_the_same_run_and_the_new_form_is_kept(older, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name, other in (("a.txt", "text.txt"), ("b.txt", "heldout.txt"), ("qwen3", "teacher")):
        (tmp_path / name).rename(tmp_path / "elsewhere" / other)
    place = tmp_path / "elsewhere"
    moved = wanted(
        teacher=str(place / "teacher"),
        data={"train": [str(place / "text.txt")], "heldout": str(place / "heldout.txt")},
    )
    assert accept(moved, older).again == ()
    older.prepare(moved)
    assert older.content()["fingerprints"] == FORM
    assert changed(moved, older).again == ()
    (place / "text.txt").write_text("another text\n")
    with pytest.raises(ConfigError, match="data.train or data.heldout are others"):
        changed(moved, older)


def test_a_stage_of_an_older_run_may_be_lengthened(older):
    longer = wanted(finetune={**STAGE, "train_iters": 5, "lr_decay_iters": 2})
    found = changed(longer, older)
    assert found.again == ("export", "report") and "goes on" in found.longer[0]


def test_a_record_that_does_not_fit_stays_one_of_other_inputs(older):
    steps = {name: {**record, "fingerprint": "x"} for name, record in older.records().items()}
    write_json(older.manifest_file, {"format_version": 1, "steps": steps})
    assert up_to_date(older, wanted()).records()["align"]["fingerprint"] == "x"


def test_a_stage_that_began_from_elsewhere_is_understood(older, tmp_path):
    start = tmp_path / "other"
    start.mkdir()
    (start / "manifest.json").write_text("{}")
    manifest = dict(older.content())
    manifest["started"] = {"teacher": RECORDED["teacher"], "finetune": "c9c1e09db19cccba1fbc4e8c"}
    del manifest["steps"]["finetune"], manifest["steps"]["export"], manifest["steps"]["report"]
    write_json(older.manifest_file, manifest)
    (older.stage("finetune") / "checkpoints" / "iter_0000001").mkdir(parents=True)
    assert changed(wanted(), older, None, ("finetune", start)).again == ()
    (start / "manifest.json").write_text("[]")
    with pytest.raises(ConfigError, match="--redo-from finetune"):
        changed(wanted(), older, None, ("finetune", start))
