"""Weights & Biases, through its library. Keys stay where the library looks for them
(WANDB_API_KEY or its own login); none passes through the configuration of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hypenet.config.schema import WandbConfig
from megatron_hypenet.training.trackers.base import Settings, Tracker

STEP = "step"
"""The name of the optimizer step, the axis of every chart."""


class Wandb(Tracker):
    """One part of a run as a run of Weights & Biases, in the group of the whole run."""

    name = "Weights & Biases"

    def __init__(
        self, config: WandbConfig, *, run_id: str, group: str, part: str, folder: Path
    ) -> None:
        """Continue the run `run_id`, or begin it; files of the library go to `folder`."""
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            id=run_id,
            resume="allow",
            group=group,
            name=f"{group} {part}",
            job_type=part,
            dir=str(folder),
            # the log of a run stays as it is, and environment and code stay on this machine
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        # a continued run repeats steps, which the library's own counter would drop
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values at `step`."""
        self._run.log({STEP: step, **values})

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text as an entry of the run's summary."""
        self._run.summary[tag] = text

    def image(self, tag: str, png: bytes) -> None:
        """Show a picture."""
        from PIL import Image

        self._run.log({tag: self._wandb.Image(Image.open(io.BytesIO(png)))})

    def results(self, settings: Settings, metrics: Mapping[str, float]) -> None:
        """Record settings as the run's configuration, and results in its summary."""
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.summary.update(dict(metrics))

    def flush(self) -> None:
        """Do nothing: the library writes in the background."""

    def close(self) -> None:
        """Wait until everything is written or sent, and end."""
        self._run.finish()
