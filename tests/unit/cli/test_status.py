import json

import pytest

from megatron_hypenet.cli import main as cli
from megatron_hypenet.cli.status import last_lines, last_save, lines_of, number_of, seconds_of
from megatron_hypenet.halo.run_folder import RunFolder

LOG = """\
2026-11-23T12:58:10 [4/10] align: stage 1: align an RNN mixer per layer
2026-11-23T12:58:11   iter 1/6 | loss 34.27 | gnorm 5.86 | lr 1.00e-03 | 1.1k tok/s \
| 559 tok/s/gpu | eta 1s | whole run: 1m08s left
2026-11-23T12:58:11   iter 2/6 | loss 42.05 | gnorm 6.5 | lr 9.14e-04 | 2.6k tok/s \
| 1.3k tok/s/gpu | eta 5s | whole run: 48s left
2026-11-23T12:58:11   saved /tmp/sr1/align/checkpoints/iter_0000002 in 0.4s
""".splitlines()


def test_the_log_says_step_and_iteration():
    step, iteration = last_lines(LOG)
    assert step == {
        "name": "align",
        "place": 4,
        "of": 10,
        "what": "stage 1: align an RNN mixer per layer",
    }
    assert iteration == {
        "number": 2,
        "of": 6,
        "loss": 42.05,
        "tokens_per_second": 2600.0,
        "eta": "5s",
        "eta_seconds": 5.0,
        "whole_run": "48s left",
        "whole_run_seconds": 48.0,
    }


def test_an_iteration_of_an_earlier_step_is_not_that_of_this_one():
    step, iteration = last_lines(
        [*LOG, "2026-11-23T12:58:27 [5/10] select: score and rank the layers"]
    )
    assert step["name"] == "select" and iteration is None


def test_an_empty_log():
    assert last_lines([]) == (None, None)


def run_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("x: 1\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hypenet.log").write_text("\n".join(LOG) + "\n")
    for stage, step in (("align", 2), ("align", 4), ("distill", 2)):
        (tmp_path / stage / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)
    (tmp_path / "align" / "checkpoints" / "iter_0000002" / "COMMITTED").touch()
    return tmp_path


def test_only_committed_saves_count(tmp_path):
    assert last_save(tmp_path) is None
    found = last_save(run_folder(tmp_path))
    assert (
        found["checkpoint"].endswith("align/checkpoints/iter_0000002")
        and 0 <= found["seconds_ago"] < 60
    )


def test_a_run_without_jobs_has_a_status_too(tmp_path, capsys):
    folder = run_folder(tmp_path)
    assert cli.run(["status", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "\n  new\n" in out
        and f"go on with   hypenet run {folder}/config.yaml" in out
        and "align (4/10)" in out
        and "2/6, loss 42.05" in out
        # the time that it said last would be true only if it ran
        and "2.6k tokens/s when it last ran" in out
        and "left" not in out
    )
    assert cli.run(["status", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"]["number"] == 2 and found["state"] == "new"
    assert found["iteration"]["tokens_per_second"] == 2600.0
    assert found["iteration"]["eta_seconds"] is found["iteration"]["whole_run_seconds"] is None
    # the heartbeat is newer than the log, and exact
    (folder / "heartbeat").mkdir()
    beat = {"stage": "align", "iteration": 3, "train_iters": 6, "loss": None}
    beat |= {"tokens_per_second": 2612.5, "eta_seconds": 3.25}
    (folder / "heartbeat" / "rank_00000.json").write_text(json.dumps(beat))
    with RunFolder(folder).owned():
        assert cli.run(["status", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["state"] == "running"
        found = found["iteration"]
        values = (found["number"], found["tokens_per_second"], found["eta_seconds"])
        assert values == (3, 2612.5, 3.25)
        assert cli.run(["status", str(folder)]) == 0
        out = capsys.readouterr().out
    assert "  iteration    3/6\n" in out
    assert "2.6k tokens/s, this stage: 3s left; whole run: 48s left" in out


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5s", 5.0), ("1m12s", 72.0), ("1h02m", 3720.0), ("", None), ("unknown", None)],
)
def test_times_are_read_back(text, seconds):
    assert seconds_of(text) == seconds


def test_counts_are_read_back():
    assert [number_of(text) for text in ("12", "1.2k", "5.7M", "x")] == [12.0, 1200.0, 5.7e6, None]


def test_a_damaged_manifest_is_a_line_of_the_status(tmp_path, capsys):
    folder = run_folder(tmp_path)
    (folder / "manifest.json").write_text("{")
    assert cli.run(["status", str(folder)]) == 0
    assert "manifest.json: not valid JSON" in capsys.readouterr().out


def test_what_is_no_run_folder(tmp_path, capsys):
    assert cli.run(["status", str(tmp_path)]) == 5
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {
                "state": "RUNNING",
                "live": True,
                "nodes": "n[1-2]",
                "time_left": "9:48",
                "requeues": 2,
            },
            "RUNNING on n[1-2], 9:48 left, started again 2x",
        ),
        ({"state": "PENDING", "live": True, "reason": "Dependency"}, "PENDING (Dependency)"),
        (
            {"state": "FAILED", "reason": "NonZeroExitCode", "note": "ended with code 5"},
            "FAILED (NonZeroExitCode); ended with code 5",
        ),
        ({"state": "COMPLETED", "note": "ended with code 0"}, "COMPLETED"),
    ],
)
def test_a_line_per_job(row, says):
    job = {
        "id": 7,
        "part": "align",
        "live": False,
        "reason": "",
        "nodes": "",
        "time_left": "",
        "requeues": 0,
        "note": "",
        **row,
    }
    found = {
        "run": "r",
        "jobs": [job],
        "faulty_nodes": [],
        "step": None,
        "iteration": None,
        "last_save": None,
        "finished": [],
        "problem": "",
        "state": "failed",
        "where": "",
        "why": "it is damaged",
        "seconds_ago": 72.0,
        "go_on": "hypenet requeue r",
    }
    assert lines_of(found)[1:3] == [
        "  failed       1m12s ago: it is damaged",
        "  go on with   hypenet requeue r",
    ]
    assert lines_of(found)[3].endswith(f"align     {says}")
