import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from megatron_hypenet.cli import doctor
from megatron_hypenet.cli.main import run
from megatron_hypenet.model import transformer_engine


def verdicts(findings):
    return {finding.name: finding.verdict for finding in findings}


def test_this_machine_passes_as_table_and_as_json(capsys, tmp_path):
    assert run(["doctor", "--folder", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "megatron-core",
        "deepspeed",
        "transformers",
        "import megatron.core",
        "gloo",
        "memory",
        "disk",
    ):
        assert any(line.split()[1:2] == [name.split()[0]] for line in table.splitlines()), name
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and {"name", "verdict", "detail", "fix"} == set(report["findings"][0])


def test_broken_part_exits_4_and_says_the_fix(capsys, monkeypatch):
    finding = doctor.Finding("torch", "broken", "2.0, needs >=2.6", "pip install 'torch>=2.6'")
    monkeypatch.setattr(doctor, "examine", lambda folder: [finding])
    assert run(["doctor"]) == 4
    captured = capsys.readouterr()
    assert "broken" in captured.out and "-> pip install 'torch>=2.6'" in captured.out
    assert captured.err.startswith("error: this machine is not ready: torch")


def test_broken_part_in_json(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda folder: [doctor.Finding("torch", "broken", "x")])
    assert run(["doctor", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_version_verdicts():
    torch = importlib.metadata.version("torch")
    assert doctor.check_version("torch", ">=2.6").verdict == "ok"
    too_old = doctor.check_version("torch", ">=99")
    assert (
        too_old.verdict == "broken"
        and torch in too_old.detail
        and too_old.fix == "pip install 'torch>=99'"
    )
    assert doctor.check_version("no-such-library", ">=1").verdict == "broken"


def test_declared_ranges_are_read_and_extras_left_out():
    found = verdicts(doctor.check_versions())
    assert found["torch"] == "ok" and found["psutil"] == "ok"
    assert "transformer-engine" not in found and "ruff" not in found


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-package")
    assert verdicts(doctor.check_versions()) == {"no-such-package": "broken"}


def test_old_python_is_broken(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9, "final", 0))
    assert doctor.check_python()[0].verdict == "broken"


def test_library_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "crooked.py").write_text("print('noise')\nraise OSError('libfoo.so: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.check_import("crooked", "crooked-lib")
    assert (
        finding.verdict == "broken"
        and "OSError: libfoo.so: not found" in finding.detail
        and "crooked-lib" in finding.fix
    )


def test_missing_compiler_is_a_note_with_the_fix(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **kwargs: None)
    found = {finding.name: finding for finding in doctor.check_compilers()}
    assert found["g++"].verdict == "note" and found["g++"].fix == "apt-get install g++"


def test_full_or_unwritable_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "MIN_FREE_DISK_GIB", 1e9)
    assert doctor.check_disk(tmp_path / "not" / "yet").verdict == "broken"
    monkeypatch.setattr(doctor.os, "access", lambda *args: False)
    assert "not writable" in doctor.check_disk(tmp_path).detail


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def crash():
        raise RuntimeError("surprise")

    monkeypatch.setattr(doctor, "check_compilers", crash)
    findings = doctor.examine(Path("."))
    assert any(finding.verdict == "broken" and "surprise" in finding.detail for finding in findings)


@pytest.mark.parametrize("gib", [0.0, 1e9])
def test_little_memory_is_a_note(monkeypatch, gib):
    monkeypatch.setattr(doctor, "MIN_RAM_GIB", gib)
    assert doctor.check_memory().verdict == ("note" if gib else "ok")


def test_kernels_without_a_gpu_is_an_unready_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor.check_gpu_kernels()
    assert finding.verdict == "broken" and "no CUDA GPU" in finding.detail
    assert run(["doctor", "--kernels"]) == 4


def test_kernels_report_each_check(monkeypatch):
    from megatron_hypenet.model import kernel_guard
    from megatron_hypenet.ops.selftest import KernelCheck

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    checks = [
        KernelCheck("a", "o", 1e-3, 8e-3),
        KernelCheck("b", "dq", 1e-1, 8e-3),
        KernelCheck("c", "", float("inf"), 8e-3, "CompilationError: no such instruction"),
    ]
    monkeypatch.setattr(kernel_guard, "check_all_kernels", lambda device: iter(checks))
    good, off, failed = doctor.check_gpu_kernels()
    assert (good.verdict, good.detail, good.fix) == ("ok", "o is off by 1.0e-03, limit 8.0e-03", "")
    assert (off.verdict, off.detail) == (
        "broken",
        "dq is off by 1.0e-01, limit 8.0e-03",
    ) and "torch form" in off.fix
    assert (failed.verdict, failed.detail) == ("broken", "CompilationError: no such instruction")


@pytest.mark.parametrize(
    ("version", "fault", "verdict", "says"),
    [
        (None, "", "note", "not installed; optional"),
        ("2.20.2", "2.20.2 does not import with torch", "note", "does not work: 2.20.2 does not"),
        ("2.20.2", "", "ok", "2.20.2, works with this torch and CUDA"),
    ],
)
def test_the_doctor_says_whether_transformer_engine_fits(
    monkeypatch, version, fault, verdict, says
):
    monkeypatch.setattr(transformer_engine, "version_of", lambda package: version)
    monkeypatch.setattr(transformer_engine, "import_fault", lambda: fault)
    (found,) = doctor.check_transformer_engine()
    assert found.verdict == verdict and says in found.detail
    assert bool(found.fix) == (verdict == "note")
