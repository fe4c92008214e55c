"""Files that come with the package: presets (configs/), the demo's teacher (assets/), job scripts
(slurm/); from the repository, or from an installed wheel, which has them under share/."""

from __future__ import annotations

import functools
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
"""The repository; of an installed package the folder that holds it."""

FOLDERS = ("configs", "assets", "slurm")
SHARE = Path("share", "megatron_hypenet")
KINDS = ("run", "cluster", "model", "stage")
"""Folders of configs/: what a preset is for."""


@functools.cache
def bundle() -> Path:
    """Return the folder that holds FOLDERS."""
    places = [sysconfig.get_path("data"), site.getuserbase()]
    found = [REPO_ROOT, *(Path(place) / SHARE for place in places if place)]
    return next((place for place in found if (place / "configs" / "run").is_dir()), REPO_ROOT)


def bundled(path: Path) -> Path:
    """Return `path`, or the bundled file of that name where it begins with one of FOLDERS and does
    not exist from the current folder."""
    inside = not path.is_absolute() and path.parts[:1] and path.parts[0] in FOLDERS
    if inside and not path.exists() and (bundle() / path).exists():
        return bundle() / path
    return path


def preset(path: Path, kind: str) -> Path:
    """Return the configuration meant by `path`: a file, or the name of a preset of `kind`, one of
    KINDS."""
    if path.exists() or path.is_absolute() or len(path.parts) != 1:
        return bundled(path)
    named = bundle() / "configs" / kind / f"{path.name.removesuffix('.yaml')}.yaml"
    return named if named.is_file() else path


def presets() -> Iterator[tuple[str, Path]]:
    """Yield (kind, file) of every preset."""
    for kind in KINDS:
        for path in sorted((bundle() / "configs" / kind).glob("*.yaml")):
            yield kind, path
