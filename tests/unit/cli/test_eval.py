"""`hypenet eval` as a user starts it."""

import json
import shutil

import pytest
import torch
import yaml

from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.cli import eval as verb
from megatron_hypenet.cli.main import run
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.model.hypenet import build_model
from tests import tiny_run
from tests.tiny import tiny_model_config, whole_tensors


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
    (model / "distill").mkdir()

    def names(path, beside=None):
        return list(verb._models(path, beside, layer=None, out=None)[0])

    assert names(model) == ["teacher", "run"]
    assert names(model / "distill") == ["teacher", "distill"]
    assert names(model, [teacher]) == ["tiny-qwen3", "run"]


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--probes", "haystack"], 2, "no task; choose from needle,"),
        (["--probes", "none"], 2, "nothing to measure"),
        (["--lengths", "12x"], 2, "give numbers with commas"),
        (["--depths", "2"], 2, "must be 0 to 1"),
        (["--text", "/nowhere/x"], 5, "/nowhere/x"),
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


def test_inside_a_run_results_lie_in_it_and_its_tensorboard_and_report_show_them(
    words, teacher, tmp_path, capsys
):
    from tests.unit.halo.test_report import ROWS
    from tests.unit.training.trackers.test_tensorboard import scalars

    run_folder = tmp_path / "run"
    (run_folder / "report").mkdir(parents=True)
    settings = yaml.safe_load(tiny_run.write_config(run_folder / "report").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    content = {"rows": ROWS, "seq_length": 16, "attention_layers": [0], "seconds": 1.0}
    (run_folder / "report" / "report.json").write_text(json.dumps(content))
    shutil.copytree(teacher, run_folder / "export")
    place = words.index("--out")
    inside = ["eval", str(run_folder / "export"), *words[2:place], *words[place + 2 :]]
    assert run(inside) == 0
    rows = json.loads((run_folder / "eval" / "eval.json").read_text())["rows"]
    shown = scalars(run_folder / "tb" / "tasks" / "export")
    (loss,) = [row["score"] for row in rows if row["task"] == "loss"]
    assert shown["by-length/loss"] == [(96, pytest.approx(loss))]
    assert set(shown) >= {"tasks/needle", "tasks/q/generation"}
    capsys.readouterr()
    assert run(["report", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] == rows
    assert run(["report", str(run_folder)]) == 0
    assert "needle  " in capsys.readouterr().out.split("hypenet eval (")[1]


@pytest.fixture(scope="module")
def checkpoint(teacher, tmp_path_factory):
    """Provide the checkpoint of a random student with the bundled teacher's tokenizer."""
    root = tmp_path_factory.mktemp("layouts")
    sizes = {"vocab_size": 2048, "num_query_groups": 2, "eos_token_id": 0}
    model = build_model(tiny_model_config(**sizes), ParallelConfig(), dtype=torch.float32, seed=3)
    write_weights(root / "plain", whole_tensors(model), model.model_config, kind="student")
    export_hf(root / "plain", root / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(teacher / name, root / "hf")
    import_hf(root / "hf", root / "student")
    return root / "student"


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["--tp 2 --sp", "--pp 2", "--cp 2"])
def test_any_layout_gives_the_rows_of_one_process(words, checkpoint, tmp_path, layout, capfd):
    questions = tmp_path / "q.jsonl"
    questions.write_text(questions.read_text() + '{"prompt": "The sky is", "answer": "x"}\n')
    place = words.index("--device")
    given = ["eval", str(checkpoint), *words[2:place], "--json"]
    found = []
    for name, more in (("one", ["--device", "cpu"]), ("many", layout.split())):
        given[given.index("--out") + 1] = str(tmp_path / name)
        capfd.readouterr()
        assert run([*given, *more]) == 0
        found.append(json.loads(capfd.readouterr().out)["rows"])
    one, many = found
    assert len(one) == len(many) > 5
    for mine, theirs in zip(one, many, strict=True):
        assert theirs == {**mine, "score": pytest.approx(mine["score"], rel=1e-5)}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--cp", "2", "--engine", "vllm"], "give one or the other"),
        (["--cp", "2"], "a layout is of the training model; import it first"),
    ],
)
def test_layouts_are_of_checkpoints(words, more, says, capsys):
    place = words.index("--device")
    assert run([*words[:place], *more]) == 2
    assert says in capsys.readouterr().err


def test_outside_of_a_run_a_place_is_needed(teacher, capsys):
    assert run(["eval", str(teacher)]) == 2
    assert "lies in no run; give --out" in capsys.readouterr().err
