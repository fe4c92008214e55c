"""The benchmark of the distillation head runs, tiny, on a CPU; a saved run can be drawn again."""

import csv
import importlib.util
import json
import sys

import pytest


@pytest.fixture(scope="module")
def bench(repo_root):
    spec = importlib.util.spec_from_file_location(
        "bench_kd_head", repo_root / "tools" / "bench" / "kd_head.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_is_right_and_can_be_redrawn(bench, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert bench.main(["--tiny", "--out", str(first)]) == 0
    assert sorted(path.suffix for path in first.iterdir()) == [".csv", ".json", ".md", ".png"]
    saved = next(first.glob("*.json"))
    record = json.loads(saved.read_text())
    ours = [row for row in record["errors"] if row["name"] == "ours"]
    assert [row["loss"] for row in ours] == ["kl", "ce"]
    # gradients of bf16 tensors: half a unit in the last place is 2e-3 of each number, and logit
    # gradients are rounded on the way
    assert all(
        0 < row["dX_error"] < 5e-3 and 0 < row["dW_error"] < 5e-3 and row["value_error"] < 1e-5
        for row in ours
    ), ours
    assert {row["name"] for row in record["times"]} == {"bare products", "ours"} and all(
        row["ms"] > 0 for row in record["times"]
    )
    with next(first.glob("*.csv")).open() as file:
        assert len(list(csv.DictReader(file))) == len(record["times"])
    record["notes"] = ["Measured before the move."]
    saved.write_text(json.dumps(record))
    assert bench.main(["--redraw", str(saved), "--out", str(second)]) == 0
    assert [path.name for path in sorted(second.iterdir())] == [
        path.name for path in sorted(first.iterdir())
    ]
    assert "Measured before the move." in next(second.glob("*.md")).read_text()


def test_recorded_results_are_what_the_script_writes(bench, repo_root, tmp_path):
    """Tables beside a recorded run say what its numbers say."""
    for saved in (repo_root / "tools" / "bench" / "results").glob("kd_head_*.json"):
        assert bench.main(["--redraw", str(saved), "--out", str(tmp_path)]) == 0
        for suffix in (".json", ".csv", ".md"):
            assert (tmp_path / saved.name).with_suffix(suffix).read_text() == saved.with_suffix(
                suffix
            ).read_text()
