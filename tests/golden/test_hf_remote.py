"""Exported folders under the installed transformers and under 4.57: the reference's numbers, caching, padding and generation.

Each check runs in a process of its own where this package cannot be imported, on a folder that was moved after the export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf

HERE = Path(__file__).parent
CASES = sorted(path for path in (HERE / "data").iterdir() if path.is_dir())
COMPAT = HERE.parents[1] / ".compat" / "transformers-4.57"
RELATIVE = 1e-5  # the reference's RoPE tables are fp32


def environment(version: str, modules: Path) -> dict[str, str]:
    """Variables of a process that sees that transformers; fails, rather than skips, when the older one was not installed."""
    found = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found.pop("PYTHONPATH", None)
    if version == "4.57":
        assert COMPAT.is_dir(), f"{COMPAT} is missing: run tools/install_compat.sh"
        found["PYTHONPATH"] = str(COMPAT)
    return found


@pytest.fixture(params=["installed", "4.57"])
def version(request):
    return request.param


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request):
    return request.param


def measure(case, kind, name, version, tmp_path):
    import_hf(case / kind, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    shutil.rmtree(tmp_path / "ckpt")
    elsewhere = (tmp_path / "hf").rename(tmp_path / "elsewhere")
    command = [sys.executable, HERE / "hf_remote_worker.py", elsewhere, case / "golden.safetensors", name]
    done = subprocess.run(
        command, env=environment(version, tmp_path / "modules"), cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["transformers"].startswith("4.57.") == (version == "4.57")
    assert result["unfit_keys"] == []
    return result


def test_student_is_the_reference(case, version, tmp_path):
    result = measure(case, "hypenet", "student_logits", version, tmp_path)
    assert result["class"] == "transformers_modules.HypeNetForCausalLM"
    assert result["logits"] < RELATIVE and result["hidden"] < RELATIVE and result["loss"] < RELATIVE
    assert result["cache"] < 1e-11, "token by token differs from the whole prompt"
    assert result["padding"] < 1e-11, "a left-padded batch differs from its rows"
    assert result["padded_generation"] and result["generation"]


def test_teacher_is_plain_qwen3(case, version, tmp_path):
    result = measure(case, "qwen3", "teacher_logits", version, tmp_path)
    assert result["class"] == "transformers.Qwen3ForCausalLM" and result["logits"] < RELATIVE


def test_modelling_code_passes_its_unit_tests_under_4_57(repo_root, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/export/hf_remote"]
    done = subprocess.run(command, env=environment("4.57", tmp_path), cwd=repo_root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
