"""MLflow, through its client library: a server, or a folder as its file store. Keys stay in the
environment (MLFLOW_TRACKING_TOKEN and its like)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hypenet.config.schema import MlflowConfig
from megatron_hypenet.training.trackers.base import Settings, Tracker

RUN = "hypenet.run"
"""The tag by which a continued part of a run is found again."""


class Mlflow(Tracker):
    """One part of a run as a run of MLflow."""

    name = "MLflow"

    def __init__(self, config: MlflowConfig, *, run_id: str, group: str, part: str) -> None:
        """Continue the run with the tag `run_id`, or begin it."""
        if "://" not in config.uri:
            # MLflow asks for this word before it uses a folder; runs that are read by `mlflow ui`
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        uri = config.uri if "://" in config.uri else Path(config.uri).absolute().as_uri()
        self._client: Any = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = (
            self._client.create_experiment(config.experiment)
            if found is None
            else found.experiment_id
        )
        earlier = self._client.search_runs(
            [experiment], filter_string=f"tags.`{RUN}` = '{run_id}'", max_results=1
        )
        run = (
            earlier[0]
            if earlier
            else self._client.create_run(
                experiment, run_name=f"{group} {part}", tags={RUN: run_id, "hypenet.part": part}
            )
        )
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values at `step`; those that are not finite are left out, which no store of
        MLflow takes alike."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(tag, value, now, step) for tag, value in values.items() if math.isfinite(value)
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Store a text as a file of the run."""
        self._client.log_text(self._run_id, text, f"{tag}.txt")

    def image(self, tag: str, png: bytes) -> None:
        """Store a picture as a file of the run."""
        import tempfile

        folder, _, name = tag.rpartition("/")
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / f"{name}.png"
            file.write_bytes(png)
            self._client.log_artifact(self._run_id, str(file), folder or None)

    def results(self, settings: Settings, metrics: Mapping[str, float]) -> None:
        """Record settings as parameters, and results as metrics."""
        from mlflow.entities import Param

        found = [Param(key, str(value)[:500]) for key, value in settings.items()]
        self._client.log_batch(self._run_id, params=found)
        self.scalars(0, metrics)

    def flush(self) -> None:
        """Do nothing: every call writes."""

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)
