"""What a run's trackers show beside its points."""

import json

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import SetupError
from megatron_hypenet.halo import tracking
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.parallel import groups
from tests.unit.halo.test_report import ROWS
from tests.unit.halo.test_run_folder import config
from tests.unit.training.trackers.test_tensorboard import PNG, scalars


@pytest.fixture
def folder(tmp_path):
    groups.init_parallel(ParallelConfig())
    return RunFolder(tmp_path / "run")


def text_of(events, tag):
    (event,) = events.Tensors(f"{tag}/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def test_a_stage_begins_with_configuration_layout_and_versions(folder):
    run = config(folder.root)
    for tracker in tracking.of_stage(run, folder, "distill", [2, 1], 0):
        tracker.close()
    events = EventAccumulator(str(folder.tensorboard / "distill")).Reload()
    assert yaml.safe_load(text_of(events, "run/config"))["teacher"] == "teacher"
    layout = text_of(events, "run/layout")
    assert "layers per pipeline stage  2, 1" in layout and "ZeRO stage                 1" in layout
    assert "torch" in text_of(events, "run/versions") and "commit" in text_of(
        events, "run/versions"
    )
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_pictures_and_results_are_shown_anew(folder):
    run = config(folder.root)
    for place in (folder.report_file, folder.importance_plot):
        place.parent.mkdir(parents=True)
    folder.importance_plot.write_bytes(PNG)
    folder.report_plot.write_bytes(PNG)
    content = {"rows": ROWS, "seq_length": 16, "attention_layers": [0], "seconds": 1.0}
    folder.report_file.write_text(json.dumps(content))
    tracking.show_selection(run, folder, "method gates, 4 tokens", [0.5, 0.25])
    assert scalars(folder.tensorboard / "selection") == {"selection/kl": [(1, 0.5), (2, 0.25)]}
    events = EventAccumulator(str(folder.tensorboard / "selection")).Reload()
    assert text_of(events, "report/selection") == "method gates, 4 tokens"
    tracking.show_report(run, folder)
    tracking.show_report(run, folder)
    assert scalars(folder.tensorboard / "report") == {
        "report/lm-loss": [(0, pytest.approx(3.3))],
        "report/recall-1x": [(0, 97.0)],
        "report/recall-2x": [(0, 80.0)],
    }
    for part, tag in (("selection", "report/importance"), ("report", "report/figure")):
        events = EventAccumulator(str(folder.tensorboard / part)).Reload()
        assert len(events.Images(tag)) == 1


def test_an_evaluation_is_shown_by_model_over_the_context_length(folder, tmp_path):
    def row(model, task, score, **more):
        return {"model": model, "measure": "m", "task": task, "score": score, "count": 1, **more}

    rows = [
        row("teacher", "loss", 2.0, length=64),
        row("run", "loss", 2.5, length=64),
        row("run", "loss", 2.25, length=128),
        row("run", "loss by position", 9.0, length=64, position="0-63"),
        row("run", "needle", 100.0, length=64, depth=0.0),
        row("run", "needle", 50.0, length=64, depth=1.0),
        row("run", "quiz", 25.0, way="generation"),
    ]
    (tmp_path / "eval.png").write_bytes(PNG)
    for _ in range(2):  # an evaluation that goes on is shown in the place of the earlier one
        tracking.show_evaluation(config(folder.root), folder, rows, tmp_path / "eval.png")
    place = folder.tensorboard / "tasks"
    assert scalars(place / "teacher") == {"by-length/loss": [(64, 2.0)]}
    assert scalars(place / "run") == {
        "by-length/loss": [(64, 2.5), (128, 2.25)],
        "tasks/needle": [(64, 75.0)],
        "tasks/quiz/generation": [(0, 25.0)],
    }
    assert len(EventAccumulator(str(place / "run")).Reload().Images("tasks/figure")) == 1


def test_a_service_that_fails_stops_a_stage_before_it_begins_and_not_a_report(
    folder, tmp_path, caplog
):
    (tmp_path / "file").touch()  # in the place of a store
    run = config(folder.root, trackers={"mlflow": {"uri": str(tmp_path / "file")}})
    with pytest.raises(SetupError, match="trackers.mlflow: .*trackers.mlflow=null"):
        tracking.of_stage(run, folder, "distill", [2, 1], 0)
    folder.importance_plot.parent.mkdir(parents=True)
    folder.importance_plot.write_bytes(PNG)
    tracking.show_selection(run, folder, "method uniform")
    assert "trackers.mlflow" in caplog.text
    assert (folder.tensorboard / "selection").is_dir()


def test_a_service_gets_what_tensorboard_gets(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = config(folder.root, trackers={"mlflow": {"uri": str(tmp_path / "store")}})
    for tracker in tracking.of_stage(run, folder, "distill", [2, 1], 0):
        tracker.scalars(1, {"train/kl": 0.5})
        tracker.close()
    assert scalars(folder.tensorboard / "distill")["train/kl"] == [(1, 0.5)]
    (file,) = (tmp_path / "store").rglob("train/kl")
    assert file.read_text().split()[1:] == ["0.5", "1"]
    assert list((tmp_path / "store").rglob("run/config.txt"))
