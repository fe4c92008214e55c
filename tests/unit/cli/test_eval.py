"""`hypenet eval` as a user starts it."""

import json

import pytest

from megatron_hypenet.cli import eval as verb
from megatron_hypenet.cli.main import run


@pytest.fixture(scope="module")
def teacher(repo_root):
    return repo_root / "assets" / "tiny-qwen3"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It is a truth universally acknowledged that a test must be short. " * 12)
    return file


@pytest.fixture
def words(teacher, text, tmp_path):
    """Provide a short evaluation of one model."""
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Colour?", "choices": ["green", "blue"], "answer": 1}\n')
    out = str(tmp_path / "out")
    given = ["--text", str(text), "--lengths", "96", "--depths", "0.5", "--probes", "needle,pairs"]
    count = ["--count", "1", "--loss-count", "1", "--dtype", "float32", "--device", "cpu"]
    return ["eval", str(teacher), "--out", out, "--questions", str(questions), *given, *count]


def test_rows_table_and_heat_map(words, tmp_path, capsys):
    assert run([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["measurements:", "4", "done:", "0"]
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["task", "where", "tiny-qwen3"]
    for line in ("loss by position", "needle", "pairs", "log-likelihood", "generation"):
        assert line in out
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    losses = [row for row in found["rows"] if row["task"] == "loss"]
    assert len(losses) == 1 and 0 < losses[0]["score"] < 20
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert "4 of 4" in err


def test_an_interrupted_evaluation_continues(words, tmp_path, capsys, monkeypatch):
    measured = verb._measured

    def stops(*given):
        for place, found in enumerate(measured(*given)):
            if place == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(verb, "_measured", stops)
    assert run(words) == 130
    file = tmp_path / "out" / "eval.json"
    before = json.loads(file.read_text())["rows"]
    assert {row["measure"] for row in before} == {"loss 96", "needle 96 0.5"}
    capsys.readouterr()
    monkeypatch.setattr(verb, "_measured", measured)
    assert run([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert rows[: len(before)] == before and "1 of 2" in err
    assert len({row["measure"] for row in rows}) == 4
    assert run([*words, "--seed", "9"]) == 2
    assert "an evaluation of other models, files or settings" in capsys.readouterr().err


def test_a_run_is_compared_with_its_teacher(tmp_path, teacher):
    model = tmp_path / "run"
    (model / "teacher").mkdir(parents=True)
    (model / "config.yaml").touch()
    assert list(verb._models(model, None)) == ["teacher", "run"]
    assert list(verb._models(model / "distill", None)) == ["teacher", "distill"]
    assert list(verb._models(model, [teacher])) == ["tiny-qwen3", "run"]


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--probes", "haystack"], 2, "no task; choose from needle,"),
        (["--probes", "none"], 2, "nothing to measure"),
        (["--lengths", "12x"], 2, "give numbers with commas"),
        (["--depths", "2"], 2, "must be 0 to 1"),
        (["--text", "/nowhere/x"], 4, "/nowhere/x"),
    ],
    ids=str,
)
def test_mistakes_are_one_message(teacher, tmp_path, capsys, given, code, says):
    assert run(["eval", str(teacher), "--out", str(tmp_path / "out"), *given]) == code
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_models_of_one_name_are_refused(teacher, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--beside", str(teacher)]
    assert run(["eval", str(teacher), *words]) == 2
    assert "the same name" in capsys.readouterr().err


def test_the_table_lines_up():
    rows = [
        {"task": "loss", "length": 2048, "a": 1.23456, "b": 2.0},
        {"task": "needle", "length": 2048, "depth": 0.5, "a": 100.0},
    ]
    assert verb.table(rows, ["a", "b"]).splitlines() == [
        "task    where                        a      b",
        "loss    2,048 tokens             1.235  2.000",
        "needle  2,048 tokens, depth 0.5  100.0",
    ]
