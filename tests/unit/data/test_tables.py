"""Columns of Parquet and Arrow files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hypenet.data.sources import find_files
from megatron_hypenet.data.tables import batches_of_table
from megatron_hypenet.errors import DataError

TEXTS = [f"text {number}" for number in range(250)]
TABLE = pa.table({"id": list(range(250)), "text": TEXTS})


def written(path):
    if path.suffix == ".parquet":
        pq.write_table(TABLE, path, row_group_size=100)
    else:
        new = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=60)
    return find_files(path).files[0]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("skip", [0, 1, 60, 100, 137, 250])
def test_rows_from_any_place(tmp_path, name, skip):
    file = written(tmp_path / name)
    found = list(batches_of_table(file, "text", skip, 64))
    assert [value for values, _ in found for value in values] == TEXTS[skip:]
    assert all(len(values) <= 64 for values, _ in found)
    shares = [share for _, share in found]
    assert shares == sorted(shares) and all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_bad_tables(tmp_path, name):
    file = written(tmp_path / name)
    with pytest.raises(DataError, match=r"row 1: no column 'body' \(found: id, text\)"):
        next(batches_of_table(file, "body", 0, 9))
    content = file.path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:40]):
        file.path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}: not a readable .*fetch the file again"):
            list(batches_of_table(file, "text", 0, 9))
