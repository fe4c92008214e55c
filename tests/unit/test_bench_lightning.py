"""The benchmark of Lightning Attention runs, tiny, on a CPU; its verdicts are computed from its
rows."""

import csv
import importlib.util
import json
import sys

import pytest


@pytest.fixture(scope="module")
def bench(repo_root):
    spec = importlib.util.spec_from_file_location(
        "bench_lightning", repo_root / "tools" / "bench" / "lightning.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_writes_all_files(bench, tmp_path, capsys):
    assert bench.main(["--tiny", "--out", str(tmp_path)]) == 0
    assert "B1 T64 of 24 H2 D16" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md", ".png"]
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(result["about"]) >= {"gpu", "date", "torch", "triton", "fla", "copy_gbps"}
    assert all(0 < row["error dq"] < 1e-2 and row["fwd+bwd ms"] > 0 for row in result["rows"])
    with next(tmp_path.glob("*.csv")).open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])


def test_goals_are_judged_by_ratio_and_error(bench):
    def row(op, fwd, both, error):
        ratios = {"fwd x fla": 2.0 / fwd, "fwd+bwd x fla": 9.0 / both}
        return {
            "shape": "B1 T131072 H16",
            "op": op,
            "fwd ms": fwd,
            "fwd+bwd ms": both,
            **{f"error {x}": error for x in bench.OUTPUTS},
        } | ratios

    text = bench.markdown([row("ours", 1.0, 9.5, 3e-3), row("fla", 2.0, 9.0, 2e-3)], {"gpu": "X"})
    assert "fwd: 2.00x, goal 2.0x: met" in text and "fwd+bwd: 0.95x, goal 2.8x: missed" in text
    assert "slower than FLA: B1 T131072 H16 fwd+bwd (0.95x)" in text
    assert "errors at most FLA's: missed; the largest against it is 1.5000 of it" in text
    text = bench.markdown(
        [row("ours", 1.0, 3.0, 2.001e-3), row("fla", 2.0, 9.0, 2e-3)], {"gpu": "X"}
    )
    assert (
        "slower than FLA: none" in text
        and "errors at most FLA's: met; the largest against it is 1.0005 of it" in text
    )


def test_one_word_chooses_rows(bench, tmp_path, capsys):
    assert bench.main(["--tiny", "--only", "fp32,D999", "--out", str(tmp_path)]) == 0
    assert [
        row["shape"] for row in json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    ] == ["B2 T33 H3 D16 fp32"]
    with pytest.raises(SystemExit):
        bench.main(["--tiny", "--only", "no such row", "--out", str(tmp_path)])
    assert "no row's name holds it" in capsys.readouterr().err
