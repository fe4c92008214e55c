"""The table of said and true times, from a log as runs write it."""

import json
import subprocess
import sys

import pytest

from tools.bench import eta

LOG = """2026-11-27T10:00:00 CPU, 1 thread a process, float32; 1 process, ZeRO 1
2026-11-27T10:00:00 [1/3] teacher: import the teacher
2026-11-27T10:00:10 [1/3] teacher: done in 10 s
2026-11-27T10:00:10 [2/3] align: stage 1
2026-11-27T10:00:20   iter 1/9 | loss 3.2 | eta 1m | whole run: 1m20s left
2026-11-27T10:00:40   iter 4/9 | loss 3.1 | eta 40s | whole run: 1m left
2026-11-27T11:00:00 CPU, 1 thread a process, float32; 1 process, ZeRO 1
2026-11-27T11:00:00 [1/3] teacher: done before, skipped
2026-11-27T11:00:10   iter 5/9 | loss 3.1 | eta 40s | whole run: 25s left
2026-11-27T11:00:50 [2/3] align: done in 40 s | run 90 % done, 10s left
2026-11-27T11:01:00 [3/3] report: done in 10 s | run 100 % done, 0s left
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hypenet.log").write_text(LOG)
    return tmp_path


def test_said_and_true_are_in_work_that_was_done(run):
    said, total = eta.read(run / "logs" / "hypenet.log")
    assert total == 100  # 40 s before the pause of an hour, 60 s after it
    assert eta.rows(said, total) == [
        ("10%", None, 90),
        ("30%", 80, 80),
        ("60%", 25, 50),
        ("90%", 10, 10),
        ("start 2", 25, 50),
    ]
    assert eta.off(25, 50) == eta.off(50, 25) == 2 and eta.off(None, 9) == eta.off(1, 3) == 1


def test_the_exit_code_says_whether_they_are_within_the_limit(run):
    words = [sys.executable, "-m", "tools.bench.eta", str(run), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["rows"][2] == ["60%", 25, 50, 2]
    done = subprocess.run([*words, "--limit", "2"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0


def test_a_run_that_goes_on_has_no_true_time(run):
    log = run / "logs" / "hypenet.log"
    log.write_text(LOG.rpartition("2026")[0])
    with pytest.raises(ValueError, match="has not ended"):
        eta.read(log)
