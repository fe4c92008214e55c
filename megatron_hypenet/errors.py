"""Errors a user can cause or repair, and the exit code each one ends the command with.

A message is one block of text: what failed, where, the values, the rule, the fix. `cli/main.py`
prints it as `error: ...` on stderr and exits with the class's `exit_code`; a traceback appears only
with `--debug`. docs/errors.md lists the codes for users. Faults of our own code stay ordinary
exceptions (exit code 1): these classes are for what the reader of the message can act on.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class HypenetError(Exception):
    """Base of every error below; raise a subclass wherever one fits."""

    exit_code: ClassVar[int] = 1


class UsageError(HypenetError):
    """The command line itself is wrong: an unknown verb, a missing argument, options that exclude
    each other."""

    exit_code = 2


class ConfigError(HypenetError):
    """A configuration is invalid: unknown key, wrong type, missing key, or values that cannot go
    together."""

    exit_code = 3


class LayoutError(ConfigError):
    """A parallel layout breaks a rule of the model, of the batch or of the number of processes."""


class SetupError(HypenetError):
    """The machine lacks something: a library, a compiler, a device, disk space."""

    exit_code = 4


class CheckpointError(HypenetError):
    """A checkpoint is missing, uncommitted, damaged, unsafe, or does not fit the model."""

    exit_code = 5


class DataError(HypenetError):
    """Training or evaluation data is missing, empty, damaged, or too short for what was asked."""

    exit_code = 5


class ConversionError(HypenetError):
    """A Hugging Face folder and our checkpoints cannot be mapped onto each other."""

    exit_code = 5


class VerificationError(HypenetError):
    """A comparison ran to its end and found a difference."""

    exit_code = 6


class DivergedError(HypenetError):
    """Training produced a loss or gradient that is not finite, or failed its loss guard."""

    exit_code = 7


class HangError(HypenetError):
    """A process or a collective did not answer in time."""

    exit_code = 8


class QualityError(HypenetError):
    """A model is worse than a bound that its run was given."""

    exit_code = 9


class PeerError(HypenetError):
    """Another process of the run ended while this one waited for it: an echo of that process's own
    error."""

    exit_code = 1


class SavedAndRequeue(HypenetError):  # noqa: N818 - it reports a clean stop, not a fault
    """Training stopped on request with a committed checkpoint; starting the same command again
    continues it."""

    exit_code = 75


INTERRUPTED = 130
"""Exit code of a command that the keyboard ended: 128 and the number of SIGINT, as shells have
it."""


def exit_code_of(fault: BaseException) -> int:
    """Return the exit code that a fault leads to, wherever it is reported."""
    if isinstance(fault, HypenetError):
        return fault.exit_code
    if isinstance(fault, KeyboardInterrupt):
        return INTERRUPTED
    if is_disk_full(fault) or (isinstance(fault, OSError) and fault.filename):
        return SetupError.exit_code
    return HypenetError.exit_code


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether `error`, or one that led to it, says that the disk (or the quota on it) is
    full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors writes in Rust and torch.save in C++: a failed write of theirs has a text and
        # no errno
        text = str(error)
        if "No space left on device" in text or (
            "inline_container" in text and "unexpected pos" in text
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
