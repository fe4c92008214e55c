"""TensorBoard's event files: described scalars, texts, pictures, the layout of the page CUSTOM
SCALARS, and the row of the page HPARAMS."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hypenet.training.tags import LAYOUT, tag_of
from megatron_hypenet.training.trackers.base import Settings, Tracker


class TensorBoard(Tracker):
    """The event files in one folder, which TensorBoard shows as one of its runs."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int = 0, *, layout: bool = False) -> None:
        """Continue after `step`: TensorBoard then drops later points of earlier starts, those of a
        start that ended before its first save included. With `layout` the folder has the charts of
        `tags.LAYOUT`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import custom_scalars

        self._described: set[str] = set()
        self._writer: Any = FileWriter(str(folder))
        self._writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=step + 1, session_log=restart))
        if layout:
            charts = {
                category: {
                    title: ["Multiline", [f"^{tag}$" for tag in tags]]
                    for title, tags in charts.items()
                }
                for category, charts in LAYOUT.items()
            }
            self._writer.add_summary(custom_scalars(charts))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values at `step`; the first value of a tag carries its unit and meaning."""
        from tensorboard.compat.proto.summary_pb2 import DataClass, Summary, SummaryMetadata

        found = []
        for name, value in values.items():
            one = Summary.Value(tag=name, simple_value=value)
            if name not in self._described:
                self._described.add(name)
                about = tag_of(name)
                described = SummaryMetadata(
                    summary_description=f"{about.meaning} (unit: {about.unit})" if about else "",
                    plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
                    # TensorBoard's data server keeps descriptions of values with a class only
                    data_class=DataClass.DATA_CLASS_SCALAR,
                )
                one.metadata.CopyFrom(described)
            found.append(one)
        self._writer.add_summary(Summary(value=found), step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show a text; several lines are indented, which Markdown takes for code and leaves as they
        are."""
        from torch.utils.tensorboard.summary import text as text_summary

        lines = text.splitlines()
        block = text if len(lines) < 2 else "\n".join(f"    {line}" for line in lines)
        self._writer.add_summary(text_summary(tag, block), step)

    def image(self, tag: str, png: bytes) -> None:
        """Show a picture."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # of the header that begins every PNG
        picture = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]))

    def results(self, settings: Settings, metrics: Mapping[str, float]) -> None:
        """Add a row to the page HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in settings.items()
        }
        self.scalars(0, metrics)
        for summary in hparams(plain, dict(metrics)):
            self._writer.add_summary(summary)

    def flush(self) -> None:
        """Write what is buffered to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered, and end."""
        self._writer.close()
