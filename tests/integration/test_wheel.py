"""The wheel, installed beside the libraries of this environment, does in an empty folder what the
README says, with its own presets, teacher and templates: nothing is read from the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOURCES = ("megatron_hypenet", "launchers", "configs", "assets", "slurm")
FILES = ("pyproject.toml", "README.md", "LICENSE")

# Runs before anything else in the installed environment, and notes every file of the repository
# that is opened or listed; the libraries may lie inside of it.
WATCH = """
import os, sys
ROOT, LIBRARIES, NOTES = {root!r}, {libraries!r}, {notes!r}

def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.abspath(os.fspath(arguments[0]))
        if path.startswith(ROOT + "/") and not path.startswith(LIBRARIES + "/"):
            with os.fdopen(os.open(NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as notes:
                notes.write(path + chr(10))

sys.addaudithook(watch)
"""  # noqa: E501


@pytest.fixture(scope="module")
def hypenet(repo_root, tmp_path_factory):
    """Provide a function from words to (exit code, stdout, stderr) of the installed command, in an
    empty folder, its attribute `folder`; the environment is its attribute `prefix`."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for name in SOURCES:
        shutil.copytree(
            repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in FILES:
        shutil.copy(repo_root / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(root), str(source)]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = root.glob("*.whl")
    prefix = root / "environment"
    venv.create(prefix, with_pip=False, symlinks=True)
    python = prefix / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", *offline, str(wheel)], check=True, timeout=200
    )
    shutil.rmtree(source)  # where the wheel was built, nothing is left to be read
    own = Path(sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)}))
    libraries = sysconfig.get_path("purelib")
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # lines of a .pth file are only added to the path: an editable installation there is not found
    (own / "libraries.pth").write_text("\n".join(dict.fromkeys([libraries, *paths])) + "\n")
    notes = root / "read"
    # not sitecustomize.py: Debian's Python has one of its own before every environment's
    (own / "watch.pth").write_text("import watch_reads\n")
    (own / "watch_reads.py").write_text(
        WATCH.format(
            root=str(repo_root), libraries=str(Path(libraries).parents[2]), notes=str(notes)
        )
    )
    folder = root / "empty"
    folder.mkdir()

    def call(*words):
        done = subprocess.run(
            [str(prefix / "bin" / "hypenet"), *map(str, words)],
            cwd=folder,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=100,
        )
        return done.returncode, done.stdout, done.stderr

    call.folder, call.prefix, call.notes = folder, prefix, notes
    return call


def test_presets_are_listed_and_copied(hypenet):
    code, out, err = hypenet("config", "list", "--json")
    names = {row["name"] for row in json.loads(out)["presets"]}
    assert code == 0 and {"quickstart", "demo", "testcluster", "hypenet_2b", "align"} <= names, err
    code, out, _ = hypenet("config", "copy", "testcluster", "my_cluster.yaml")
    assert code == 0 and (hypenet.folder / "my_cluster.yaml").is_file()


def test_a_run_and_the_demo_would_start_with_what_the_wheel_brings(hypenet):
    share = hypenet.prefix / "share" / "megatron_hypenet"
    (hypenet.folder / "corpus.txt").write_text("It is a truth universally acknowledged.\n" * 200)
    words = ["teacher=assets/tiny-qwen3", "data=corpus.txt", "--dry-run", "--json"]
    code, out, err = hypenet("run", "quickstart", *words)
    assert code == 0 and json.loads(out)["config"]["teacher"] == f"{share}/assets/tiny-qwen3", err
    code, out, err = hypenet("demo", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["config"]["data"]["train"] == [
        f"{share}/assets/tiny-qwen3/sample.txt"
    ]
    assert [row["state"] for row in plan["steps"]] == ["to do"] * 10


def test_a_job_would_be_submitted_with_the_template_and_the_installed_package(hypenet):
    words = ["align.micro_batch_size=2", "distill.micro_batch_size=2", "--dry-run"]
    code, out, err = hypenet("submit", "demo", "--cluster", "testcluster", *words)
    assert code == 0, err
    packages = hypenet.prefix / "lib"
    assert "#SBATCH --job-name=demo-run" in out
    (line,) = [line for line in out.splitlines() if line.startswith("export PYTHONPATH=")]
    assert str(packages) in line and f"{hypenet.prefix}/bin/python -m launchers.slurm" in out


def test_nothing_was_read_from_the_repository(hypenet, repo_root):
    check = [str(hypenet.prefix / "bin" / "python"), "-c", f"open({str(repo_root / 'LICENSE')!r})"]
    read = hypenet.notes.read_text() if hypenet.notes.exists() else ""
    subprocess.run(check, check=True, timeout=60)
    assert read == "" and hypenet.notes.read_text() == f"{repo_root / 'LICENSE'}\n"
