"""The record of a fault: one schema, written whole, read back or not at all, without torch."""

import json

import pytest

from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.supervision.fault_record import attempt_file, read_record, record_of
from tests.processes import loaded_by


def test_what_is_written_is_read_back(tmp_path):
    try:
        raise ValueError("no such sample")
    except ValueError as fault:
        record = record_of(fault, rank=3, life="x", stage="align", iteration=2, echo=True)
    path = tmp_path / "new" / "rank_00003.json"
    record.write(path)
    assert read_record(path) == record
    assert (record.type, record.error, record.code) == (
        "ValueError",
        "ValueError: no such sample",
        1,
    )
    assert 'raise ValueError("no such sample")' in record.traceback


def test_the_job_script_finds_code_and_echo_by_line(tmp_path):
    """It has no JSON reader."""
    path = tmp_path / "rank-0000.error.json"
    record_of(CheckpointError("gone"), rank=0, echo=True).write(path)
    assert {'  "code": 5,', '  "echo": true,'} <= set(path.read_text().splitlines())


def test_a_torn_or_missing_record_is_none(tmp_path):
    assert read_record(tmp_path / "none.json") is None
    record_of(ValueError(), rank=0).write(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text[:-20])
    assert read_record(tmp_path / "a.json") is None
    content = json.loads(text)
    for field in content:
        (tmp_path / "a.json").write_text(
            json.dumps({name: value for name, value in content.items() if name != field})
        )
        assert read_record(tmp_path / "a.json") is None, field


def test_a_folder_that_takes_no_files_costs_the_record_alone(tmp_path):
    (tmp_path / "file").write_text("")
    record_of(ValueError(), rank=0).write(tmp_path / "file" / "a.json")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, None), ({"HYPENET_ATTEMPT_LOGS": "/a"}, "/a/rank-0012.error.json")],
)
def test_the_place_beside_a_jobs_logs(environment, expected):
    found = attempt_file(12, environment)
    assert (found and str(found)) == expected


def test_a_host_is_called_as_slurm_calls_it():
    assert record_of(ValueError(), rank=0, environment={"SLURMD_NODENAME": "n2"}).host == "n2"


def test_needs_no_torch():
    assert loaded_by("import megatron_hypenet.supervision.fault_record", ("torch",)) == []
