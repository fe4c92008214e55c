"""The runs in a folder, one line each."""

import json

from megatron_hypenet.cli import main as cli
from tests.unit.cli.test_status import run_folder


def test_runs_are_listed_with_their_state(tmp_path, capsys):
    for name in ("a", "deep/b"):
        (tmp_path / name).mkdir(parents=True)
        run_folder(tmp_path / name)
    (tmp_path / "a" / "jobs.json").write_text("{")
    assert cli.run(["runs", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["run"] for row in rows] == [str(tmp_path / "a"), str(tmp_path / "deep" / "b")]
    assert rows[0]["state"] == "unknown" and "jobs.json" in rows[0]["why"]
    assert rows[1]["step"]["name"] == "align" and rows[1]["iteration"]["number"] == 2
    assert cli.run(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "unknown" in shown and "align 4/10" in shown and "2/6" in shown and "42.05" in shown


def test_a_folder_without_runs_and_no_folder(tmp_path, capsys):
    assert cli.run(["runs", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out
    assert cli.run(["runs", str(tmp_path / "none")]) == 5
