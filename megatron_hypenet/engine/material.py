"""What a run reads: its text as token files, training sequences from them, and the held-out material that models are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.engine.loop import TokenSource
from megatron_hypenet.engine.measure import Measure
from megatron_hypenet.engine.run_folder import RunFolder


def prepare(run: RunConfig, folder: RunFolder, log: Callable[[str], None]) -> dict[str, Any]:
    """Make token files of the run's text with the teacher's tokenizer, in the folder's data/."""
    raise NotImplementedError


def training_data(run: RunConfig, folder: RunFolder) -> TokenSource:
    """Training sequences: text blended with recall documents."""
    raise NotImplementedError


def measure(run: RunConfig, folder: RunFolder) -> Measure:
    """Held-out text and recall documents over it."""
    raise NotImplementedError
