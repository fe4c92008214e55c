"""A real lm-eval, from .lm-eval beside the environment, with tasks of local files."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hypenet.cli.main import run
from megatron_hypenet.errors import DataError, SetupError
from megatron_hypenet.eval import harness
from megatron_hypenet.eval.suite import Model

ROOT = Path(__file__).resolve().parents[3]
LINES = [
    {"question": "It is a truth", "choices": ["universally", "qzx"], "answer": 0, "said": "u"},
    {"question": "Once upon a", "choices": ["qzx", "time"], "answer": 1, "said": " time"},
]


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """Put lm-eval on the path of Python; it is never skipped for want of it."""
    place = ROOT / ".lm-eval" / "site-packages"
    assert place.is_dir(), f"{place} is missing: run make lm-eval"
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "home"))


@pytest.fixture
def tasks(tmp_path):
    """Provide a folder with two tasks over one file: choices, and an answer to be said."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    said = {
        "task": "toy_said",
        "output_type": "generate_until",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["\n", "!"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, said):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.mark.slow
def test_eval_hands_a_folder_to_lm_eval_offline(lm_eval, tasks, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--probes", "none", "--tasks", "toy_choice,toy_said", "--include-path", str(tasks)]
    given = ["eval", str(ROOT / "assets" / "tiny-qwen3"), "--out", str(out), "--device", "cpu"]
    assert run([*given, *words, "--json"]) == 0
    shown, _ = capsys.readouterr()
    rows = json.loads(shown)["rows"]
    assert [(row["task"], row["way"], row["count"]) for row in rows] == [
        ("toy_choice", "acc", 2),
        ("toy_choice", "acc_norm", 2),
        ("toy_said", "exact_match", 2),
    ]
    # the bundled teacher knows English and says more than a letter
    assert [row["score"] for row in rows[:2]] == [100.0, 100.0] and rows[2]["score"] < 100
    assert run([*given, *words, "--limit", "1"]) == 2  # other settings
    capsys.readouterr()
    assert (
        run([*given, "--probes", "none", "--tasks", "no_such", "--include-path", str(tasks)]) == 2
    )
    assert f"no task of lm-eval or in {tasks} has this name" in capsys.readouterr().err


def encode(text):
    return [ord(letter) for letter in text]


def asked_model():
    """Return a model that finds `b` likely after `a` alone, and says `b!c` to everything."""

    def score(ids):
        likely = (ids[:, :-1] == ord("a")) & (ids[:, 1:] == ord("b"))
        return torch.where(likely, 0.5, 3.0), likely

    return Model(score, lambda ids, most: "b!c"[:most], encode, end_tokens=[0])


def test_likelihoods_rolling_texts_and_answers(lm_eval):
    from lm_eval.api.instance import Instance

    def requests(kind, *given):
        return [Instance(kind, {}, one, 0) for one in given]

    model = harness.language_model(asked_model())
    assert model.loglikelihood(requests("loglikelihood", ("xa", "b"), ("a", "bb"), ("", "b"))) == [
        (-0.5, True),
        (-3.5, False),
        (-3.0, False),  # behind the end token
    ]
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("ab",))) == [-3.5]
    given = [("x", {"until": ["!"]}), ("x", {"until": "c", "max_gen_toks": 2}), ("", {})]
    assert model.generate_until(requests("generate_until", *given)) == ["b", "b!", "b!c"]
    with pytest.raises(ValueError, match="answers here are greedy"):
        model.generate_until(requests("generate_until", ("x", {"do_sample": True})))
    with pytest.raises(DataError, match="names no end token"):
        harness.language_model(Model(None, None, encode))


def test_a_chat_template_writes_question_and_examples(lm_eval, tasks):
    asked = []

    def chat(messages, answers):
        asked.append([message["role"] for message in messages])
        return "".join(f"<{one['role']}>{one['content']}" for one in messages) + (
            "<assistant>" if answers else ""
        )

    prompts = []

    def answer(ids, most):
        prompts.append("".join(map(chr, ids)))
        return "b"

    plain = asked_model()
    model = replace(plain, answer=answer, chat=chat)
    found = harness.Tasks(["toy_said"], tasks)
    found.rows(model, "toy_said", limit=1)
    assert prompts == ["It is a truth"]
    found.rows(model, "toy_said", limit=1, fewshot=1, chat=True)
    assert asked == [["user", "assistant", "user"]]  # the example is a turn of its own
    assert prompts[1].endswith("<user>It is a truth<assistant>")
    with pytest.raises(DataError, match="no chat template; leave out --chat"):
        found.rows(plain, "toy_said", chat=True)


def test_data_that_are_not_there_are_one_message(lm_eval, tasks):
    file = tasks / "toy_said.yaml"
    file.write_text(file.read_text().replace("data.jsonl", "gone.jsonl"))
    found = harness.Tasks(["toy_said"], tasks)
    with pytest.raises(DataError, match="task toy_said of lm-eval does not run: .*gone.jsonl"):
        found.rows(asked_model(), "toy_said", fewshot=None, limit=None)


def test_rows_of_metrics():
    results = {
        "alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "word_perplexity,none": 9.0,
        "exact_match,strict": 0.25, "sample_len": 4, "f1_stderr,none": "N/A",
    }  # fmt: skip
    assert harness.metric_rows("t", results, {"effective": 4}) == [
        {"task": "t", "way": "acc", "score": 50.0, "count": 4},
        {"task": "t", "way": "word_perplexity", "score": 9.0, "count": 4},
        {"task": "t", "way": "exact_match, strict", "score": 25.0, "count": 4},
    ]


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SetupError, match=r'pip install "megatron-hypenet\[eval\]"'):
        harness.Tasks(["hellaswag"], None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "3"], "add --tasks NAME"),
        (["--chat"], "add --tasks NAME"),
        (["--tasks", "x", "--include-path", "/nowhere"], "no folder; name one with YAML files"),
    ],
)
def test_mistakes_are_one_message(tmp_path, capsys, words, says):
    given = ["eval", str(ROOT / "assets" / "tiny-qwen3"), "--out", str(tmp_path / "out")]
    assert run([*given, *words]) == 2
    assert says in capsys.readouterr().err
