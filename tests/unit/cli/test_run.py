"""`hypenet run` as a user starts it, on a random tiny teacher."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_hypenet.cli.main import run
from tests import tiny_run


@pytest.fixture
def config(tmp_path, monkeypatch):
    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    return tiny_run.write_config(tmp_path)


def snapshot(root: Path) -> dict[str, int]:
    """Return every file below `root` with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_run_makes_a_model_and_running_again_does_nothing(config, tmp_path, capsys):
    assert run(["run", str(config)]) == 0
    shown = capsys.readouterr()
    assert "student after stage 3" in shown.out and str(tmp_path / "run" / "export") in shown.out
    assert "[10/10] report: done" in shown.err and "float32; 1 process, ZeRO 1\n" in shown.err
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert exported["model_type"] == "hypenet" and exported["attn_logits_scaling"] == "hype 500"
    with safe_open(tmp_path / "run" / "export" / "model.safetensors", "pt") as tensors:
        assert "model.embed_tokens.weight" in tensors.keys()  # noqa: SIM118 - a safetensors handle is no mapping
    before = snapshot(tmp_path / "run")
    assert run(["run", str(config), "--json"]) == 0
    again = capsys.readouterr()
    assert again.err.count("done before, skipped") == 10
    chosen = json.loads((tmp_path / "run" / "selection" / "mixers.json").read_text())
    assert json.loads(again.out)["attention_layers"] == chosen["attention_layers"]
    changed = {
        path for path, time in snapshot(tmp_path / "run").items() if before.get(path) != time
    }
    # the last one is its heartbeat
    assert {Path(path).name for path in changed} <= {
        "hypenet.log",
        "config.yaml",
        "rank_00000.json",
        "start.json",
    }


def test_an_interrupted_run_continues_with_the_same_losses(config, tmp_path, monkeypatch, capsys):
    """A run is stopped in the middle of distillation and started again; every loss is that of a run
    in one piece."""
    assert run(["run", str(config), f"output_dir={tmp_path / 'whole'}"]) == 0
    stop = tmp_path / "run" / "distill" / "STOP"

    class Stopping(tiny_run.Sequences):
        def batch(self, sample_start, count, seq_length):
            if (tmp_path / "run" / "assembled").exists() and not stop.exists():
                stop.parent.mkdir(exist_ok=True)
                stop.touch()
            return super().batch(sample_start, count, seq_length)

    monkeypatch.setattr(
        "megatron_hypenet.halo.datasets.training_data", lambda run, folder: Stopping()
    )
    assert run(["run", str(config)]) == 75
    assert run(["run", str(config)]) == run(["run", str(config), "--dry-run"]) == 2
    assert (
        capsys.readouterr().err.count(
            f"error: {stop} asks for a stop, and it was there before this command; delete it"
        )
        == 2
    )
    monkeypatch.setattr(
        "megatron_hypenet.halo.datasets.training_data", lambda run, folder: tiny_run.Sequences()
    )
    stop.unlink()
    assert run(["run", str(config)]) == 0
    for stage in ("align", "distill", "finetune"):
        losses = [
            (tmp_path / name / stage / "losses.jsonl").read_text() for name in ("whole", "run")
        ]
        assert losses[0] == losses[1], stage


def test_dry_run_touches_nothing(config, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert run(["run", str(config), "--dry-run"]) == 0
    assert "10. report" in capsys.readouterr().out
    assert run(["run", str(config), "--dry-run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["config"]["align"]["train_iters"] == 2 and {
        row["state"] for row in content["steps"]
    } == {"to do"}
    assert snapshot(tmp_path) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("teacher=nowhere", 5, "teacher nowhere does not exist"),
        ("data=nowhere.txt", 5, "nowhere.txt does not exist"),
        ("align.lr=-1", 3, "align.lr"),
        ("align.global_batch_size=3", 0, ""),
        ("select.num_attention_layers=9", 3, "select.num_attention_layers=9"),
        ("select.num_attention_layers=0", 3, "select.num_attention_layers"),
        ("parallel.tensor_model_parallel_size=2", 3, "tensor_model_parallel_size"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    config, tmp_path, capsys, words, override, code, message
):
    if code == 0 and not words:
        return  # a valid setting: only the dry run is of interest here
    assert run(["run", str(config), override, *words]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_changed(config, tmp_path, capsys):
    """What has not begun is free; what has is named, kept, and done again on request."""
    assert run(["train", str(config), "--stage", "align"]) == 0
    aligned = snapshot(tmp_path / "run" / "align" / "checkpoints")
    kept = (tmp_path / "run" / "config.yaml").read_text()
    for words in ([], ["--dry-run"]):
        assert run(["run", str(config), "align.lr=0.5", *words]) == 3
        reported = capsys.readouterr().err
        assert "align.lr: 0.001 there, 0.5 now" in reported
        assert "align would be done again: --redo-from align" in reported
    assert run(["run", str(config), "align.lr=0.5", "--dry-run", "--overwrite"]) == 0
    assert run(["run", str(config), "--overwrite", "--redo-from", "align"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    assert run(["run", str(config), "distill.lr=0.5", "finetune.lr_schedule=constant"]) == 0
    reported = capsys.readouterr().err
    assert "changed since the last start: distill.lr: 0.001 there, 0.5 now" in reported
    assert (
        "no finished step is done again" in reported and "align: done before, skipped" in reported
    )
    assert snapshot(tmp_path / "run" / "align" / "checkpoints") == aligned
    # the last stage goes on from where it ended, and the export follows
    changes = ["distill.lr=0.5", "finetune.lr_schedule=constant", "finetune.train_iters=3"]
    assert run(["run", str(config), *changes]) == 0
    reported = capsys.readouterr().err
    assert "finetune: goes on from its last checkpoint to step 3" in reported
    assert "resumed from" in reported and "at iter 2/3" in reported and "iter 3/3" in reported
    assert "done again: export, report" in reported and reported.count("skipped") == 7
    # asked for, a step is done again although nothing differs
    assert run(["run", str(config), *changes, "--redo-from", "finetune"]) == 0
    reported = capsys.readouterr().err
    assert "resumed from" not in reported and reported.count("skipped") == 7
