"""The interface of a tracker, and the wrapper that keeps a failing one from ending a run."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""Settings of a run by dotted key; values are text, numbers, booleans, lists of these, or None."""


class Tracker(ABC):
    """A place that shows the quantities of one part of a run. Only the first process has one."""

    name: str
    """What messages call it."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values by tag at `step`."""

    @abstractmethod
    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text."""

    @abstractmethod
    def image(self, tag: str, png: bytes) -> None:
        """Show a picture, the content of a PNG file."""

    @abstractmethod
    def results(self, settings: Settings, metrics: Mapping[str, float]) -> None:
        """Record the settings of a finished run beside its results, for tables over many runs."""

    @abstractmethod
    def flush(self) -> None:
        """Write what is buffered to the disk."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered, and end."""


class Guarded(Tracker):
    """A tracker whose first failure is logged and ends its use: a service that does not answer must
    not end a run of days."""

    def __init__(self, tracker: Tracker) -> None:
        self.name = tracker.name
        self._tracker: Tracker | None = tracker

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values by tag at `step`."""
        self._do(lambda tracker: tracker.scalars(step, values))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text."""
        self._do(lambda tracker: tracker.text(tag, text, step))

    def image(self, tag: str, png: bytes) -> None:
        """Show a picture."""
        self._do(lambda tracker: tracker.image(tag, png))

    def results(self, settings: Settings, metrics: Mapping[str, float]) -> None:
        """Record settings and results."""
        self._do(lambda tracker: tracker.results(settings, metrics))

    def flush(self) -> None:
        """Write what is buffered."""
        self._do(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Write what is buffered, and end."""
        self._do(lambda tracker: tracker.close())
        self._tracker = None

    def _do(self, what: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        except Exception as error:  # whatever a foreign client raises
            self._tracker = None
            logger.warning(
                "WARNING: %s gets no more values of this run (%s: %s); TensorBoard and "
                "metrics.jsonl in the run folder have them all",
                self.name,
                type(error).__name__,
                error,
            )
