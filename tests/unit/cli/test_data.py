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
    assert code == 0 and "would tokenize" in out and not list(tmp_path.glob("a.[bip]*"))
    (tmp_path / "a.txt").write_text("")
    code, _, err = hypenet("prepare", tmp_path / "a.txt", tmp_path / "a", *TOKENIZER, "--dry-run")
    assert code == 5 and "holds no text" in err
    code, _, err = hypenet("merge", tmp_path / "b", tmp_path / "missing", "--dry-run")
    assert code == 5 and "no such file" in err


def test_shares_workers_and_statistics(hypenet, tmp_path):
    lines = [json.dumps({"body": "word " * n}) for n in range(1, 200)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    words = (*TOKENIZER, "--text-key", "body", "--seq-length", "100", "--json")
    code, out, _ = hypenet("prepare", tmp_path / "b.jsonl", tmp_path / "b", *words)
    made = json.loads(out)
    assert code == 0 and made["documents"] == 199 and made["longest"] == 201
    assert made["cut_documents"] == 101 / 199 and 0 < made["cut_tokens"] < 0.5
    names = [tmp_path / f"part{number}" for number in range(3)]
    for number, name in enumerate(names):
        more = ("--part", f"{number}/3", "--workers", "2")
        assert hypenet("prepare", tmp_path / "b.jsonl", name, *words, *more)[0] == 0
    assert hypenet("merge", tmp_path / "c", *names)[0] == 0
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"c{suffix}").read_bytes()
    code, out, _ = hypenet("inspect", tmp_path / "b", "--seq-length", "100", "--json")
    shown = json.loads(out)
    assert shown["longest"] == 201 and shown["cut_documents"] == made["cut_documents"]
    for part in ("3/3", "1", "a/2", "-1/2"):
        code, _, err = hypenet(
            "prepare", tmp_path / "b.jsonl", tmp_path / "d", "--part", part, *words
        )
        assert code == 2 and "expected I/N" in err or "No such option" in err


def test_a_killed_command_goes_on(hypenet, tmp_path, repo_root):
    """The whole process group of a real command is killed once it has noted a state."""
    import os
    import signal
    import subprocess
    import sys
    import time

    text = "".join(json.dumps({"text": f"Text {n}. " * 20}) + "\n" for n in range(60_000))
    (tmp_path / "b.jsonl").write_text(text)
    words = ["prepare", tmp_path / "b.jsonl", tmp_path / "b", *TOKENIZER, "--workers", "2"]
    quick = (
        "from megatron_hypenet.data import prepare; prepare.COMMIT_SECONDS = 0.0; "
        "from megatron_hypenet.cli.main import main; main()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", quick, "data", *map(str, words)],
        start_new_session=True,
        cwd=repo_root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "b.preparing" / "progress.json"
    while not journal.exists() and started.poll() is None:
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert started.returncode == -signal.SIGKILL and not (tmp_path / "b.bin").exists()
    assert hypenet(*words)[0] == 0 and not journal.parent.exists()
    assert hypenet("prepare", tmp_path / "b.jsonl", tmp_path / "c", *TOKENIZER)[0] == 0
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"c{suffix}").read_bytes()


def test_bad_input_is_one_error_with_its_line_and_code(hypenet, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    code, _, err = hypenet("prepare", tmp_path / "b.jsonl", tmp_path / "b", *TOKENIZER)
    assert code == 5 and "b.jsonl, line 2: int, not text" in err and err.count("error:") == 1
    assert not list(tmp_path.glob("b.[!j]*"))
    more = ("--messages-key", "m")
    code, _, err = hypenet("prepare", tmp_path / "b.jsonl", tmp_path / "b", *TOKENIZER, *more)
    assert code == 5 and "no chat template" in err
    code, _, err = hypenet(
        "prepare", tmp_path / "b.jsonl", tmp_path / "b", *TOKENIZER, *more, "--text-key", "x"
    )
    assert code == 2 and "give one of them" in err


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_merge_cannot_overwrite_an_input_under_another_name(hypenet, tmp_path, link):
    assert hypenet("prepare", tmp_path / "a.txt", tmp_path / "a", *TOKENIZER)[0] == 0
    for suffix in (".bin", ".idx"):
        getattr(tmp_path / f"other{suffix}", link)(tmp_path / f"a{suffix}")
    before = (tmp_path / "a.bin").read_bytes()
    code, _, err = hypenet("merge", tmp_path / "other", tmp_path / "a", "--overwrite")
    assert code == 2 and "one of the pairs" in err and (tmp_path / "a.bin").read_bytes() == before
