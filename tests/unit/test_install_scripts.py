"""The scripts of `make install` and `make test` stop before they change anything when the machine
lacks what they need."""

import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def bare(tmp_path, repo_root):
    """Run a script as a normal user of a machine whose PATH has hardly anything, with further
    commands written in the test."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def command(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    command("python3", f'exec {sys.executable} "$@"')
    for name in ("bash", "dirname"):
        command(name, f'exec {shutil.which(name)} "$@"')
    command("id", "echo 1000")
    command("apt-get", f"touch {tmp_path}/called; exit 100")

    def run(script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [folder / "bash", repo_root / script, *arguments],
            env={"PATH": str(folder), "PYTHON": sys.executable} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not (tmp_path / "called").exists(), "apt-get was called"
        return done.returncode, done.stdout + done.stderr

    run.command = command
    return run


def test_a_normal_user_is_told_every_missing_package_in_one_command(bare):
    code, said = bare("tools/system_packages.sh", "test")
    assert code == 4
    packages = (
        said.splitlines()[-1]
        .removeprefix("  sudo apt-get update && sudo apt-get install -y ")
        .split()
    )
    # the daemons lie in /usr/sbin, where the script looks as well: they may be there
    assert {"make", "git", "g++", "openssh-client", "pdsh"} <= set(packages)
    assert set(packages) <= {
        "make",
        "git",
        "g++",
        "slurm-wlm",
        "munge",
        "openssh-client",
        "openssh-server",
        "pdsh",
    }


def test_ci_ends_with_the_same_code_before_make_is_called(bare, tmp_path):
    bare.command("make", f"touch {tmp_path}/made")
    code, said = bare(".ci/run")
    assert code == 4 and "g++" in said
    assert not (tmp_path / "made").exists()


def test_installing_needs_no_more_than_python_with_venv(bare):
    assert bare("tools/system_packages.sh", "install") == (0, "")


def test_without_ensurepip_the_venv_package_of_that_python_is_named(bare):
    bare.command("python", f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    code, said = bare("tools/system_packages.sh", "install", PYTHON="python")
    assert code == 4
    assert said.endswith(f"apt-get install -y python3.{sys.version_info.minor}-venv\n")


@pytest.mark.parametrize("python", ["old", "/nonexistent/python"])
def test_a_python_that_was_asked_for_is_never_replaced_by_another(bare, tmp_path, python):
    bare.command("old", "echo 3.10; exit 1")
    code, said = bare("tools/install.sh", str(tmp_path / "venv"), PYTHON=python)
    assert code == 4
    assert said == f"error: PYTHON={python} is no Python 3.11 or 3.12 that starts\n"
    assert not (tmp_path / "venv").exists()


def test_an_environment_of_another_python_is_not_touched(bare, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.14.1 || { echo 3.14; exit 1; }\n'
    )
    python.chmod(0o755)
    for environment in ({}, {"PYTHON": ""}):
        code, said = bare("tools/install.sh", str(tmp_path / "venv"), **environment)
        assert code == 4
        assert "Python 3.14.1" in said and f"remove {tmp_path / 'venv'}" in said
