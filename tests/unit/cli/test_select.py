"""`hypenet select rank` as a user starts it."""

import json
import subprocess
import sys

import pytest

from megatron_hypenet.cli.main import run

SCORES = {
    "0": {"recall": 80, "commonsense": 50},
    "1": {"recall": 60, "commonsense": 48},
    "2": {"recall": 70, "commonsense": 50},
    "3": {"recall": 60, "commonsense": 48},
}


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"layers": SCORES}))
    return path


def rank(scores, *words):
    return run(["select", "rank", "--scores", str(scores), *words])


def test_rank_writes_the_choice_and_prints_a_table(scores, tmp_path, capsys):
    out = tmp_path / "new" / "mixers.json"
    assert rank(scores, "--num-attention", "2", "--out", str(out)) == 0
    assert json.loads(out.read_text()) == {
        "mixer_types": ["lightning_attn", "attn", "attn", "lightning_attn"],
        "attention_layers": [1, 2],
    }
    shown = capsys.readouterr()
    assert "2 of 4 layers keep attention" in shown.out and "50.000" in shown.out
    assert str(out) in shown.err


def test_json_is_one_object_on_stdout(scores, capsys):
    assert rank(scores, "--num-attention", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["attention_layers"] == [2]


def test_evaluations_of_each_layer_are_ranked(tmp_path, capsys):
    for layer, recall in enumerate((80.0, 20.0, 70.0)):
        (tmp_path / str(layer)).mkdir()
        rows = [
            {"model": "m", "measure": "m", "task": task, "score": score, "count": 1}
            for task, score in (("fda", recall), ("arc", 50.0))
        ]
        content = {"plan": {"models": {"m": "m"}}, "rows": rows}
        (tmp_path / str(layer) / "eval.json").write_text(json.dumps(content))
    tasks = ("--recall", "fda", "--commonsense", "arc")
    assert rank(tmp_path, "--num-attention", "1", "--json", *tasks) == 0
    assert json.loads(capsys.readouterr().out)["attention_layers"] == [1]
    assert rank(tmp_path, "--num-attention", "1") == 2
    assert "add --recall and --commonsense" in capsys.readouterr().err
    assert rank(tmp_path / "0" / "eval.json", "--num-attention", "1", *tasks) == 2


def test_dry_run_writes_nothing(scores, tmp_path):
    assert rank(scores, "--num-attention", "1", "--out", str(tmp_path / "m.json"), "--dry-run") == 0
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(("number", "code"), [("0", 3), ("5", 3), ("-1", 3), ("many", 2)])
def test_a_wrong_number_ends_with_its_exit_code(scores, number, code):
    assert rank(scores, "--num-attention", number) == code


def test_a_failed_rank_leaves_an_older_choice_alone(scores, tmp_path, capsys):
    out = tmp_path / "mixers.json"
    out.write_text("older")
    scores.write_text('{"layers": {"0": {"recall": NaN, "commonsense": 1}}}')
    assert rank(scores, "--num-attention", "1", "--out", str(out)) == 5
    assert out.read_text() == "older"
    assert "NaN is no number" in capsys.readouterr().err


def test_missing_scores_and_bad_cap_are_refused(scores, tmp_path):
    assert rank(tmp_path / "none.json", "--num-attention", "1") == 5
    assert rank(scores, "--num-attention", "1", "--cap", "0") == 2


def test_scores_of_other_methods_are_ranked(tmp_path, capsys):
    path = tmp_path / "scores.json"
    layers = {str(layer): {"gate": gate} for layer, gate in enumerate((0.1, 0.9, 0.8, 0.2))}
    path.write_text(json.dumps({"method": "gates", "num_attention_layers": 2, "layers": layers}))
    assert rank(path, "--num-attention", "2") == 0
    assert "(method gates)" in capsys.readouterr().out
    assert rank(path, "--num-attention", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["attention_layers"] == [1, 2]
    assert rank(path, "--num-attention", "1") == 3
    assert "a choice of 2 attention layers" in capsys.readouterr().err
    assert rank(path, "--num-attention", "2", "--cap", "5") == 2
    assert "only those of halo have a largest importance" in capsys.readouterr().err


def test_a_sweep_scores_and_ranks_in_the_run_folder(tmp_path, monkeypatch, capsys):
    from tests import tiny_run

    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    config = str(tiny_run.write_config(tmp_path))
    assert run(["select", config, "--dry-run", "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)["steps"]][
        -1
    ] == "select" and not (tmp_path / "run").exists()
    assert run(["select", config, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (
        json.loads((tmp_path / "run" / "selection" / "mixers.json").read_text())["attention_layers"]
        == shown["attention_layers"]
    )
    assert (
        run(
            [
                "select",
                "rank",
                "--scores",
                str(tmp_path / "run" / "selection" / "scores.json"),
                "--num-attention",
                "1",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == shown


def test_ranking_imports_no_tensor_library(scores):
    code = (
        "import sys; from megatron_hypenet.cli.main import run; run(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    words = ["select", "rank", "--scores", str(scores), "--num-attention", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
