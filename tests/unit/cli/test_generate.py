"""`hypenet generate` as a user starts it."""

import io
import json
import shutil

import pytest

from megatron_hypenet.cli.main import run
from megatron_hypenet.export.from_hf import import_hf

PROMPT = ("--prompt", "It is a truth universally", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def teacher(repo_root):
    return repo_root / "assets" / "tiny-qwen3"


@pytest.fixture(scope="module")
def chatty(teacher, tmp_path_factory):
    """Provide the same model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(teacher, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path.write_text(json.dumps(config))
    return folder


def test_a_folder_and_its_checkpoint_say_the_same(teacher, tmp_path, capsys):
    import_hf(teacher, tmp_path / "checkpoint")
    said = []
    for model in (teacher, tmp_path / "checkpoint"):
        assert run(["generate", str(model), *PROMPT]) == 0
        out, err = capsys.readouterr()
        assert " + 6 tokens" in err and "tokens/s" in err
        said.append(out)
    assert said[0] == said[1] and said[0].strip()


def test_json_has_text_tokens_and_times(teacher, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("It is a truth")
    words = ["--file", str(file), "--max-new-tokens", "4", "--temperature", "0.8", "--json"]
    assert run(["generate", str(teacher), *words]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert len(found["tokens"]) == 4 and found["text"] and found["seconds"] > 0


def test_a_prompt_from_stdin_and_a_dry_run(teacher, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"It is")))
    assert run(["generate", str(teacher), "--file", "-", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > 0


def test_a_chat_keeps_what_was_said(chatty, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    words = ["--chat", "--system", "be short", "--max-new-tokens", "4"]
    assert run(["generate", str(chatty), *words]) == 0
    lengths = [
        int(line.rpartition("> ")[2].split(" + ")[0])
        for line in capsys.readouterr().err.splitlines()
        if " tokens, " in line
    ]
    assert len(lengths) == 2 and lengths[1] > lengths[0] + 4


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "give a prompt"),
        (["--prompt", "a", "--file", "b"], 2, "not both"),
        (["--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "a", "--top-k", "4"], 2, "add --temperature"),
        (["--prompt", "a", "--system", "b"], 2, "add --chat"),
        (["--chat", "--prompt", "a"], 5, "has no chat template"),
        (["--prompt", "a", "--engine", "vllm"], 4, "vLLM is not installed in this environment"),
        (["--file", "/nowhere/x"], 4, "/nowhere/x"),
        (["--file", "/dev/zero"], 5, "/dev/zero: not a regular file"),
        (["--prompt", "a", "--dtype", "int7"], 2, "int7"),
    ],
    ids=str,
)
def test_mistakes_are_one_message(teacher, capsys, words, code, says):
    assert run(["generate", str(teacher), *words]) == code
    out, err = capsys.readouterr()
    assert says in err and err.startswith("error: ") and not out


def test_no_text_is_refused(teacher, tmp_path, capsys):
    file = tmp_path / "x"
    file.write_bytes(b"\xff\xfe")
    assert run(["generate", str(teacher), "--file", str(file)]) == 5
    assert "not UTF-8 text" in capsys.readouterr().err


def test_more_than_the_model_claims_is_noted(teacher, capsys):
    words = ["--prompt", "a", "--max-new-tokens", "1000000", "--dry-run"]
    assert run(["generate", str(teacher), *words]) == 0
    assert "more than the" in capsys.readouterr().err
