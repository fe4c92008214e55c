"""The reference's cases in data/, and the way through a checkpoint to a folder for users."""

import shutil
from pathlib import Path

from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf

DATA = Path(__file__).parent / "data"
CASES = sorted(path for path in DATA.iterdir() if path.is_dir())


def export_case(case: Path, kind: str, target: Path) -> None:
    """Write the case's "qwen3" or "hypenet" to `target` as a user's export does."""
    checkpoint = target.with_name(f"{target.name}-checkpoint")
    import_hf(case / kind, checkpoint)
    export_hf(checkpoint, target)
    shutil.rmtree(checkpoint)
