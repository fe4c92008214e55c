"""The rows of the benchmark of several GPUs: which run on how many, and what is said of them."""

import re
import subprocess
import sys

import pytest

ROWS_OF = {
    1: ["parity, one GPU"],
    2: ["parity, TP2 + SP", "parity, DP2 ZeRO-3"],
    4: ["parity, TP2 x PP2", "parity, TP2 x CP2", "parity, PP2 x CP2", "parity, CP4"],
    8: ["parity, TP2 x PP2 x CP2", "parity, CP8", "parity, TP4 + SP", "parity, DP8 ZeRO-2"],
}


@pytest.fixture(scope="module")
def bench(repo_root):
    sys.path.insert(0, str(repo_root / "tools" / "bench"))
    import many_gpus as module

    yield module
    sys.path.pop(0)


@pytest.mark.parametrize("gpus", ROWS_OF)
def test_rows_for_more_gpus_are_named_and_not_run(bench, gpus, monkeypatch):
    ran = []

    def run(script, row, **unused):
        ran.append(row["name"])
        return {**row, "failed": "nothing is measured here"}

    monkeypatch.setattr(bench, "run_case", run)
    monkeypatch.setattr(bench, "whole_run", lambda row, *unused: run("", row))
    rows = bench.cases(gpus, tiny=False)
    found = bench.Session(gpus, minutes=1000, cpu=False).run(rows)
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    larger = {row["name"] for row in rows if row["processes"] > gpus}
    assert {row["name"] for row in found if "skipped" in row} == larger
    assert sorted(ran) == sorted(row["name"] for row in rows if row["processes"] <= gpus)
    assert set(ROWS_OF[gpus]) <= set(ran)
    said = bench.table(found)
    assert all(f"- not run: {name} (needs " in said for name in larger)


def test_two_gpus_time_a_pipeline_with_chunks_that_take_turns(bench):
    rows = {row["name"]: row for row in bench.scaling_cases(2, tiny=False)}
    plain = "stage 3, 8 x 16384 tokens, PP2"
    for chunks in (2, 4):
        row = rows[f"{plain}, {chunks} chunks"]
        assert row["parallel"]["virtual_pipeline_model_parallel_size"] == chunks
        assert (row["global_batch"], row["goal"]) == (8, 0.93)
        assert row["baseline"] == rows[plain]["baseline"]


def test_a_row_is_left_out_when_its_time_is_not_left(bench, monkeypatch):
    monkeypatch.setattr(bench, "run_case", lambda script, row, **unused: row)
    rows = [row for row in bench.cases(8, tiny=False) if row["group"] == "scaling"]
    found = bench.Session(8, minutes=0.5, cpu=False).run(rows)
    left_out = [row["name"] for row in found if "skipped" in row]
    assert "stage 3, 65536 tokens a GPU, CP8" in left_out
    assert "stage 2, 12 x 512, one GPU" not in left_out


def test_untimed_rows_share_gpus_and_every_gpu_has_at_most_two(bench, monkeypatch):
    users, most = dict.fromkeys(range(4), 0), []

    def run(script, row, environment, **unused):
        devices = [int(gpu) for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        assert len(devices) == row["processes"]
        for device in devices:
            users[device] += 1
        most.append(max(users.values()))
        for device in devices:
            users[device] -= 1
        return row

    monkeypatch.setattr(bench, "run_case", run)
    rows = [row for row in bench.cases(4, tiny=False) if row["group"] == "parity"]
    bench.Session(4, minutes=1000, cpu=False).run(rows)
    assert max(most) <= 2


def test_predictions_of_every_row_are_marked_as_such(repo_root):
    command = [sys.executable, repo_root / "tools/bench/many_gpus.py", "--predict"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = repo_root / "tools/bench/results/many_gpus_predicted.md"
    assert written.read_text(encoding="utf-8") == done.stdout
    assert "Nothing on this page was measured" in done.stdout
    assert len(re.findall(r"^\| (stage|HypeNet)", done.stdout, flags=re.MULTILINE)) == 11


@pytest.mark.slow
@pytest.mark.distributed
def test_two_cpu_processes_are_measured(repo_root, tmp_path):
    command = [
        *(sys.executable, repo_root / "tools/bench/many_gpus.py", "--out", tmp_path),
        *("--gpus", "2", "--device", "cpu"),
        *("--case", "parity, one GPU", "--case", "parity, CP2", "--case", "8 x 64 tokens"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    said = next(tmp_path.glob("many_gpus_*.md")).read_text()
    apart = re.findall(r"^\| \w+ \| CP2 \|.*\| (\S+), (\S+) \|$", said, flags=re.MULTILINE)
    assert len(apart) == 3 and all(float(value) < 1e-5 for pair in apart for value in pair)
    assert "| stage 3, 8 x 64 tokens, PP2 |" in said
    assert next(tmp_path.glob("many_gpus_*.png")).stat().st_size > 1000
