"""Read one column of a Parquet or Arrow file, the only place that uses pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_hypenet.data.sources import SourceFile
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import reason_of, shown


def batches_of_table(
    file: SourceFile, column: str, skip: int, rows: int
) -> Iterator[tuple[list[Any], float]]:
    """Yield (values of `column`, the share of the file that was read), up to `rows` values at a
    time, from row `skip` on.

    Raises DataError when the table is damaged or lacks the column.
    """
    with _named(file):
        batches = _parquet(file, column, skip) if file.kind == ".parquet" else _arrow(file, column)
        before = 0
        for values, share in batches:
            first = max(0, skip - before) if file.kind == ".arrow" else 0
            before += len(values)
            for start in range(first, len(values), rows):
                yield values.slice(start, rows).to_pylist(), share


@contextmanager
def _named(file: SourceFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path}: not a readable {file.kind} file: {shown(reason_of(error))}; fetch the "
            "file again"
        ) from None


def _check_column(file: SourceFile, column: str, names: list[str]) -> None:
    if names.count(column) != 1:
        raise DataError(
            f"{file.path}, row 1: {'two columns' if column in names else 'no column'} '{column}' "
            f"(found: {shown(', '.join(names))}); name the field that holds the text."
        )


def _parquet(file: SourceFile, column: str, skip: int) -> Iterator[tuple[Any, float]]:
    """Yield values of a Parquet file a row group at a time; row groups before row `skip` are not
    read."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path, memory_map=False) as table:
        _check_column(file, column, table.schema_arrow.names)
        total = max(1, table.metadata.num_rows)
        done = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if done + size <= skip:
                done += size
                continue
            for batch in table.iter_batches(1024, row_groups=[group], columns=[column]):
                values = batch.column(0)
                first = max(0, skip - done)
                done += len(values)
                if first < len(values):
                    yield values.slice(first), done / total


def _arrow(file: SourceFile, column: str) -> Iterator[tuple[Any, float]]:
    """Yield values of an Arrow stream, as `datasets` saves it, or of an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(file.path)) as source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            opened = pyarrow.ipc.open_file(source)
            count = opened.num_record_batches
            batches = ((opened.get_batch(n), (n + 1) / count) for n in range(count))
        else:
            source.seek(0)
            opened = pyarrow.ipc.open_stream(source)
            batches = ((batch, min(1.0, source.tell() / file.size)) for batch in opened)
        _check_column(file, column, opened.schema.names)
        at = opened.schema.names.index(column)
        for batch, share in batches:
            yield batch.column(at), share
