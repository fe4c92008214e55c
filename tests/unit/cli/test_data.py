import json

import pytest

from megatron_hypenet.cli.main import run


@pytest.fixture
def hypenet(capsys, monkeypatch, repo_root, tmp_path):
    monkeypatch.chdir(repo_root)
    (tmp_path / "a.txt").write_text("A short text.\n\nIn two paragraphs.\n")

    def call(*words):
        code = run(["data", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


TOKENIZER = ("--tokenizer", "assets/tiny-qwen3")


def test_prepare_inspect_merge(hypenet, tmp_path):
    code, out, _ = hypenet("prepare", tmp_path / "a.txt", tmp_path / "a", *TOKENIZER, "--json")
    made = json.loads(out)
    assert code == 0 and made["documents"] == 1
    code, out, _ = hypenet("merge", tmp_path / "two", tmp_path / "a", tmp_path / "a", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 2 * made["tokens"]
    code, out, _ = hypenet("inspect", tmp_path / "two", *TOKENIZER, "--json")
    shown = json.loads(out)
    assert (
        code == 0
        and shown["documents"] == 2
        and shown["text"].startswith("A short text.")
        and shown["id_type"] == "uint16"
    )
    code, out, _ = hypenet("inspect", tmp_path / "a")
    assert code == 0 and f"tokens: {made['tokens']}" in out


def test_existing_files_are_kept(hypenet, tmp_path):
    words = ("prepare", tmp_path / "a.txt", tmp_path / "a", *TOKENIZER)
    assert hypenet(*words)[0] == 0
    code, _, err = hypenet(*words)
    assert code == 2 and "--overwrite" in err
    assert hypenet(*words, "--overwrite")[0] == 0
    code, _, err = hypenet("merge", tmp_path / "a", tmp_path / "a", "--overwrite")
    assert code == 2 and "one of the pairs" in err


def test_dry_run_writes_nothing(hypenet, tmp_path):
    code, out, _ = hypenet("prepare", tmp_path / "a.txt", tmp_path / "a", *TOKENIZER, "--dry-run")
    assert code == 0 and "would tokenize" in out and not (tmp_path / "a.bin").exists()
    (tmp_path / "a.txt").write_text("")
    code, _, err = hypenet("prepare", tmp_path / "a.txt", tmp_path / "a", *TOKENIZER, "--dry-run")
    assert code == 5 and "holds no text" in err
    code, _, err = hypenet("merge", tmp_path / "b", tmp_path / "missing", "--dry-run")
    assert code == 5 and "no such file" in err
