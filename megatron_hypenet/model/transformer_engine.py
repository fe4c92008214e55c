"""Whether NVIDIA's Transformer Engine is there and fits the torch and CUDA of this machine.

It is three packages: Python code (transformer-engine), a library for one major version of CUDA
(transformer-engine-cu12, -cu13) and an extension built for one release of torch
(transformer-engine-torch). Its metadata and torch's are read first, because a wrong combination
ends an import with a message of the dynamic linker."""

from __future__ import annotations

import importlib
import importlib.metadata

from megatron_hypenet.errors import SetupError

PACKAGE = "transformer-engine"
EXTENSION = "transformer-engine-torch"
LEAST_VERSION = "2.3"
"""The first release with all three recipes of FP8."""
INSTALL = (
    "pip install --no-build-isolation 'transformer-engine[pytorch]' with the torch that is "
    "installed (docs/fp8.md)"
)


def version_of(package: str) -> str | None:
    """Return the version of an installed package from its metadata; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fault(cuda: str | None) -> str:
    """Return what is wrong with the installed packages for a torch built with this version of CUDA
    (`torch.version.cuda`), from their metadata alone; "" where nothing is."""
    from packaging.version import Version

    version = version_of(PACKAGE)
    if version is None:
        return "is not installed"
    if Version(version) < Version(LEAST_VERSION):
        return f"{version} is older than {LEAST_VERSION}"
    if cuda is None:
        return f"{version} needs a torch with CUDA, this one is for CPUs"
    core = f"{PACKAGE}-cu{cuda.split('.')[0]}"
    for part in (core, EXTENSION):
        found = version_of(part)
        if found is None:
            return f"{version} has no {part}, which torch for CUDA {cuda} needs"
        if found != version:
            return f"{version} does not go with {part} {found}"
    return ""


def import_fault() -> str:
    """Return what is wrong with Transformer Engine here, its import included; "" where it works.

    The import tells what metadata cannot: an extension built for another release of torch, or a
    CUDA library that is missing."""
    import torch

    if found := fault(torch.version.cuda):
        return found
    if not torch.cuda.is_available():
        return f"{version_of(PACKAGE)} needs a GPU, and torch sees none"
    try:
        importlib.import_module("transformer_engine.pytorch")
    # a wrong build fails with whatever its loader raises
    except Exception as error:
        said = str(error).strip().splitlines()
        return (
            f"{version_of(PACKAGE)} does not import with torch {torch.__version__}: "
            f"{type(error).__name__}: {said[0] if said else 'no message'}"
        )
    return ""


def require(setting: str) -> None:
    """Raise SetupError where `setting` asks for Transformer Engine and it does not work here."""
    if found := import_fault():
        raise SetupError(
            f"{setting} is set, and Transformer Engine {found}; {INSTALL}, or leave the setting out"
        )
