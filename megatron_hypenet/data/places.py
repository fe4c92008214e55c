"""Where a document of a corpus stands: its file, its line or row, its field, and the error that
names them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hypenet.errors import DataError


@dataclass(frozen=True, slots=True)
class Fields:
    """The field of a record that holds its document."""

    text_key: str = "text"
    messages_key: str | None = None
    """Field of a conversation; null where records hold a text."""

    @property
    def key(self) -> str:
        """Return the field that is read."""
        return self.text_key if self.messages_key is None else self.messages_key

    @property
    def chat(self) -> bool:
        """Return whether records are conversations."""
        return self.messages_key is not None


@dataclass(frozen=True, slots=True)
class Where:
    """A line or row of a file."""

    file: str
    unit: str
    """line, or row."""
    number: int
    """From 1."""

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class RecordError(DataError):
    """A defect of one record. It keeps its place apart from its text, so that a process that reads
    a part of a file can count from the file's first line later."""

    def __init__(self, where: Where, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    def moved(self, lines: int) -> RecordError:
        """Return the same defect, this number of lines further down."""
        return RecordError(replace(self.where, number=self.where.number + lines), self.reason)
