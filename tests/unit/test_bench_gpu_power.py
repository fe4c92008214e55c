"""Clock and power around a benchmark's work, from lines such as the driver writes."""

import os
import subprocess
import sys


def run(repo_root, script, **environment):
    command = [sys.executable, "-c", "from gpu_power import GpuPower\n" + script]
    return subprocess.run(
        command,
        cwd=repo_root / "tools/bench",
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_medians_of_the_drivers_lines(repo_root):
    script = (
        r"p = GpuPower(); p.read('1980, 120.5, 700.00\n' * 5 + '1400, 699.0, 700.00\n' * 5"
        r" + '1500, 690.0, 700.00\n[N/A], 1, 1\n15'); "
    )
    assert (
        run(repo_root, script + "print(vars(p))").strip()
        == "{'clock_mhz': 1500.0, 'watts': 690.0, 'limit_watts': 700.0}"
    )


def test_less_than_a_second_says_nothing(repo_root):
    script = r"p = GpuPower(); p.read('1980, 120.5, 700.00\n' * 9); print(p.clock_mhz, p.watts)"
    assert run(repo_root, script).strip() == "None None"


def test_the_driver_is_asked_about_the_first_gpu_that_is_seen(repo_root, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        '#!/bin/sh\nfor last; do :; done\nfor i in $(seq 10); do echo "${last#--id=}, 2, 3"; '
        "done\nexec sleep 30\n"
    )
    driver.chmod(0o755)
    script = "import time\nwith GpuPower() as p: time.sleep(0.5)\nprint(p.clock_mhz, p.watts)"
    assert (
        run(
            repo_root, script, PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="3,4"
        ).strip()
        == "3.0 2.0"
    )


def test_without_a_driver_nothing_is_known(repo_root):
    assert (
        run(repo_root, "with GpuPower() as p: pass\nprint(p.watts)", PATH="/nonexistent").strip()
        == "None"
    )
