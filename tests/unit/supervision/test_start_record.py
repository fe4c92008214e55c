"""The last start of a run, and how it ended."""

import os

import pytest

from megatron_hypenet.errors import CheckpointError, SavedAndRequeue
from megatron_hypenet.supervision.start_record import FILE, read_start, recorded

WORDS = ("run", "my file.yaml", "align.lr=1")


def test_a_start_says_what_where_and_who(tmp_path):
    with recorded(tmp_path, WORDS, 2):
        found = read_start(tmp_path)
        assert found.command == "hypenet run 'my file.yaml' align.lr=1"
        assert (found.pid, found.processes, found.state) == (os.getpid(), 2, "running")
        assert found.folder == os.getcwd() and found.ended is None
    assert read_start(tmp_path).state == "done" and read_start(tmp_path).ended >= found.began


@pytest.mark.parametrize(
    ("fault", "state", "code", "reason"),
    [
        (SavedAndRequeue("stopped at iter 5 on Ctrl-C"), "stopped", 75, "stopped at iter 5"),
        (CheckpointError("it is damaged"), "failed", 5, "it is damaged"),
        (ValueError("a number"), "failed", 1, "ValueError: a number"),
        (KeyboardInterrupt(), "failed", 130, "interrupted from the keyboard"),
    ],
)
def test_an_end_says_why(tmp_path, fault, state, code, reason):
    with pytest.raises(type(fault)), recorded(tmp_path, WORDS, 1):
        raise fault
    found = read_start(tmp_path)
    assert (found.state, found.code) == (state, code) and found.reason.startswith(reason)


def test_a_folder_without_a_record_or_with_half_of_one(tmp_path):
    assert read_start(tmp_path) is None
    (tmp_path / FILE).write_text("{")
    assert read_start(tmp_path) is None


def test_what_cannot_be_written_is_lost_and_the_run_goes_on(tmp_path):
    with recorded(tmp_path / "file" / "x", WORDS, 1):
        pass
    (tmp_path / "blocked").write_text("")
    with recorded(tmp_path / "blocked", WORDS, 1):
        pass
