"""Faults of users and machines, through the command: one clear block on stderr, the documented exit
code, nothing half-written."""

import os
import subprocess
import sys

import pytest

from megatron_hypenet.cli import main as cli
from megatron_hypenet.cli.main import run


def block(capsys, *words):
    """Return (exit code, stderr without the progress lines before the block)."""
    code = run([str(word) for word in words])
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err
    return code, err[err.index("error: ") :]


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (
            OSError(28, "No space left on device", "/data/x"),
            4,
            "/data/x: no space left on the disk; free space",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            4,
            "no space left on the disk",
        ),
        (
            FileExistsError(17, "File exists", "/data/x"),
            4,
            "/data/x: a file stands where a folder is needed",
        ),
        (
            PermissionError(13, "Permission denied", "/data/x"),
            4,
            "/data/x: Permission denied; check path and permissions",
        ),
        (OSError("no file named"), 1, "internal: OSError: no file named"),
    ],
)
def test_faults_of_the_machine_that_no_verb_foresaw(capsys, monkeypatch, fault, code, says):
    def dispatch(*_, **options):
        raise fault

    monkeypatch.setattr(cli, "dispatch", dispatch)
    got, err = block(capsys, "run")
    assert got == code and says in err


def test_teachers_that_are_none(capsys, repo_root, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, says in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "no Hugging Face folder (it has no config.json)"),
    ):
        config = repo_root / "configs" / "run" / "demo.yaml"
        code, err = block(
            capsys, "run", config, f"output_dir={tmp_path / 'run'}", f"teacher={place}"
        )
        assert (
            code == 5 and says in err and "teacher=PATH" in err and not (tmp_path / "run").exists()
        )


def test_a_damaged_checkpoint_is_no_teacher(capsys, repo_root, tmp_path):
    demo = repo_root / "configs" / "run" / "demo.yaml"
    assets = repo_root / "assets" / "tiny-qwen3"
    assert run(["convert", "import", str(assets), str(tmp_path / "ckpt")]) == 0
    shard = next((tmp_path / "ckpt" / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, err = block(
        capsys,
        "run",
        demo,
        f"output_dir={tmp_path / 'run'}",
        f"teacher={tmp_path / 'ckpt'}",
        "device=cpu",
    )
    assert (
        code == 5
        and "sha256 differs from the manifest" in err
        and not (tmp_path / "run" / "teacher").exists()
    )


def test_init_that_is_none_makes_no_run_folder(capsys, repo_root, tmp_path):
    demo = repo_root / "configs" / "run" / "demo.yaml"
    code, err = block(
        capsys,
        "train",
        demo,
        f"output_dir={tmp_path / 'run'}",
        "--stage",
        "finetune",
        "--init",
        tmp_path / "none",
    )
    assert code == 5 and "does not exist" in err and not (tmp_path / "run").exists()


def test_token_files_that_cannot_be_written(capsys, repo_root, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "text.txt").write_text("some text\n")
    teacher = repo_root / "assets" / "tiny-qwen3"
    code, err = block(
        capsys,
        "data",
        "prepare",
        tmp_path / "text.txt",
        tmp_path / "file" / "out",
        "--tokenizer",
        teacher,
    )
    assert code == 4 and "a file stands where a folder is needed" in err


def test_an_import_of_damaged_weights_leaves_nothing(capsys, repo_root, tmp_path):
    source = repo_root / "assets" / "tiny-qwen3"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes(
        (source / "model.safetensors").read_bytes()[:100_000]
    )
    code, err = block(capsys, "convert", "import", tmp_path / "cut", tmp_path / "ckpt")
    assert code == 5 and "not a complete safetensors file" in err
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_closed_stdout_is_no_fault(repo_root):
    words = [sys.executable, "-m", "megatron_hypenet", "config", "show", "configs/run/demo.yaml"]
    done = subprocess.run(
        words, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, cwd=repo_root, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
