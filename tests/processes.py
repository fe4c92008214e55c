"""Start other Python processes from a test, and look at what they leave."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(worker: Path, processes: int, *arguments: object, timeout: float = 240) -> str:
    """Run the script `worker` in processes of torch.distributed; returns their standard output. An
    exit code other than 0 fails the test with all output."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(worker),
        *map(str, arguments),
    ]
    return _output(command, timeout)


def tiny_benchmark(script: str, out: Path, *words: str) -> None:
    """Run a script of tools/bench with `--tiny` and `words`, from the checkout alone."""
    command = [sys.executable, str(ROOT / "tools/bench" / script), "--tiny", "--out", str(out)]
    command += words
    _output(command, 280, os.environ | {"PYTHONPATH": str(ROOT)})


def loaded_by(code: str, names: tuple[str, ...], *arguments: object) -> list[str]:
    """Return which modules of `names` a new interpreter has loaded after `code`, whose sys.argv[1:]
    are `arguments`."""
    code += f"\nimport sys\nprint('loaded:', *(name for name in {names!r} if name in sys.modules))"
    output = _output([sys.executable, "-c", code, *map(str, arguments)], 120)
    return output.splitlines()[-1].split()[1:]


def _output(command: list[str], timeout: float, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
