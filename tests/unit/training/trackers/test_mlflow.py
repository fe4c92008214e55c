"""MLflow's own client, with a folder as its store."""

import math

import pytest

from megatron_hypenet.config.schema import MlflowConfig
from megatron_hypenet.training.trackers.mlflow import Mlflow
from tests.unit.training.trackers.test_tensorboard import PNG


def test_a_part_is_one_run_over_all_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = MlflowConfig(uri=str(tmp_path / "store"), experiment="trial")
    for start in (1, 3):
        tracker = Mlflow(config, run_id="abc", group="demo", part="distill")
        for step in (start, start + 1):
            tracker.scalars(step, {"train/kl": 1 / step, "speed/mfu": math.nan})
        tracker.close()
    tracker = Mlflow(config, run_id="abd", group="demo", part="report")
    tracker.text("run/config", "a: 1")
    tracker.image("report/figure", PNG)
    tracker.results({"distill.lr": 1e-3, "data.train": ["a"]}, {"report/lm-loss": 2.5})
    tracker.flush()
    tracker.close()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("trial").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"demo distill", "demo report"}
    history = client.get_metric_history(runs["demo distill"].info.run_id, "train/kl")
    assert [(one.step, one.value) for one in history] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    report = runs["demo report"]
    assert report.info.status == "FINISHED" and report.data.metrics == {"report/lm-loss": 2.5}
    assert report.data.params == {"distill.lr": "0.001", "data.train": "['a']"}
    names = {file.path for file in client.list_artifacts(report.info.run_id, "report")}
    assert names == {"report/figure.png"}
    assert client.list_artifacts(report.info.run_id, "run")[0].path == "run/config.txt"
