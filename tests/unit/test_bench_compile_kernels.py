"""Every kernel compiles for a GPU that is not here; too little shared memory is noticed."""

import os
import subprocess
import sys

import pytest

SMALL = """
import compile_kernels as tool
tool.GPUS[80] = (108, 20_000)
sys.exit(tool.main("--gpu 80 --dims 64 --dtypes bf16".split()))
"""


@pytest.mark.slow
def test_all_kernels_compile_and_what_does_not_fit_is_named(repo_root, tmp_path):
    pytest.importorskip("triton")
    tools = repo_root / "tools" / "bench"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # the second run compiles only what its plan changes
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 140}
    whole = subprocess.run(
        [
            sys.executable,
            tools / "compile_kernels.py",
            "--gpu",
            "80",
            "--dims",
            "64",
            "--dtypes",
            "bf16",
        ],
        **run,
    )
    lines = [line for line in whole.stdout.splitlines() if " sm_80 bf16 " in line]
    assert whole.returncode == 0 and len(lines) == 41, whole.stdout + whole.stderr
    assert all(line.endswith(" bytes") for line in lines)
    small = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tools)!r}){SMALL}"], **run
    )
    assert small.returncode == 1 and "lightning 64: dkdv: " in small.stdout, small.stderr
    assert [line for line in small.stdout.splitlines() if line.endswith("OVER")]
