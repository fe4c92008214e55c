"""How far a preparation has come, as the next start of it reads it."""

import pytest

from megatron_hypenet.data.journal import Empty, Journal, earlier, is_finishing, working_folder
from megatron_hypenet.data.readers import Place
from megatron_hypenet.errors import DataError, UsageError

JOB = {"source": [["a", 1, 2]], "end token": 3}


def test_it_is_read_back_as_it_was_written(tmp_path):
    out = tmp_path / "out"
    assert earlier(out, JOB, overwrite=False) is None and not is_finishing(out)
    folder = working_folder(out)
    folder.mkdir()
    state = Journal(
        job=JOB, sizes={"tokens": 8}, place=Place(1, 2, 3), documents=4, tokens=5, answers=1,
        empty=Empty(1, ("line 2",)), finishing=True,
    )  # fmt: skip
    state.write(folder)
    assert earlier(out, JOB, overwrite=False) == state and is_finishing(out)


def test_another_job_is_not_gone_on_with(tmp_path):
    out = tmp_path / "out"
    working_folder(out).mkdir()
    Journal(job=JOB).write(working_folder(out))
    other = {**JOB, "end token": 4}
    with pytest.raises(UsageError, match=r"out.preparing holds .* \(another end token\)"):
        earlier(out, other, overwrite=False)
    assert earlier(out, other, overwrite=True) is None
    (working_folder(out) / "progress.json").write_text('{"job": 3}')
    with pytest.raises(DataError, match="progress.json.*delete its folder"):
        earlier(out, JOB, overwrite=False)


def test_empty_records_are_counted_and_the_first_are_named():
    found = Empty().with_more(["line 1"]).with_more([f"line {n}" for n in range(2, 100)])
    assert found.count == 99 and found.first[:2] == ("line 1", "line 2") and len(found.first) == 6
