"""Bring a changed checkpoint folder into agreement with itself, as whoever built it on purpose
would."""

import hashlib
import json
from pathlib import Path

from megatron_hypenet.checkpoint import format as fmt


def reseal(folder: Path, *names: str, **changes) -> Path:
    """Note the files `names` of `folder` in its manifest as they are now, change entries of the
    manifest, and hash it into COMMITTED."""
    record = json.loads((folder / fmt.MANIFEST).read_text()) | changes
    for name in names:
        content = (folder / name).read_bytes()
        record["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (folder / fmt.MANIFEST).write_text(json.dumps(record))
    (folder / fmt.COMMITTED).write_text(
        hashlib.sha256((folder / fmt.MANIFEST).read_bytes()).hexdigest() + "\n"
    )
    return folder
