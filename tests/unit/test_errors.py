import errno
import inspect

import pytest

from megatron_hypenet import errors
from megatron_hypenet.errors import HypenetError, is_disk_full

EXIT_CODES = {
    "HypenetError": 1,
    "UsageError": 2,
    "ConfigError": 3,
    "LayoutError": 3,
    "SetupError": 4,
    "CheckpointError": 5,
    "DataError": 5,
    "ConversionError": 5,
    "VerificationError": 6,
    "DivergedError": 7,
    "HangError": 8,
    "QualityError": 9,
    "PeerError": 1,
    "SavedAndRequeue": 75,
}


def _classes():
    return {
        name: cls
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, HypenetError)
    }


def test_every_error_has_its_documented_exit_code():
    assert {name: cls.exit_code for name, cls in _classes().items()} == EXIT_CODES


def test_codes_stay_off_those_other_launchers_use():
    # 16 and 17 are Megatron's rerun codes, 93 is nvidia-resiliency-ext's "do not restart", 128+n
    # are signals
    assert not {cls.exit_code for cls in _classes().values()} & {16, 17, 93, *range(128, 256)}


def test_errors_page_lists_every_code(repo_root):
    page = (repo_root / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for code in {*EXIT_CODES.values(), 0, 130}:
        assert any(line.startswith(f"| {code} |") for line in rows), (
            f"docs/errors.md has no row for exit code {code}"
        )


def test_a_full_disk_is_seen_behind_what_libraries_make_of_it():
    wrapped = ValueError("save failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    torch_says = RuntimeError(
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    )
    safetensors_says = Exception(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert all(
        is_disk_full(error)
        for error in (
            wrapped,
            wrapped.__cause__,
            torch_says,
            safetensors_says,
            OSError(errno.EDQUOT, ""),
        )
    )
    assert not any(
        is_disk_full(error)
        for error in (None, OSError(errno.EACCES, "denied"), RuntimeError("unexpected pos"))
    )


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (errors.DataError("x"), 5),
        (errors.SavedAndRequeue("x"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 4),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 4),
        (OSError("without a file"), 1),
        (ValueError(), 1),
    ],
)
def test_a_fault_leads_to_one_code_wherever_it_is_reported(fault, code):
    assert errors.exit_code_of(fault) == code
