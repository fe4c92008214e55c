"""Hugging Face folder -> checkpoint -> Hugging Face folder, with proof that all hold one model.

    python examples/convert_and_verify.py
    python examples/convert_and_verify.py --model /models/Qwen3-0.6B --out converted

Both directions read one table (`megatron_hypenet/export/mapping.py`), and every tensor must have a
row in it. `verify` compares all tensors bit by bit, then runs both models, transformers' and this
package's, on the same token ids and compares their logits."""

import argparse
import tempfile
from pathlib import Path

from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf
from megatron_hypenet.export.verify import Report, verify
from megatron_hypenet.parallel.groups import destroy_parallel

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_QWEN3 = REPOSITORY / "assets" / "tiny-qwen3"


def convert_and_verify(hf_folder: Path, out: Path) -> list[Report]:
    """Import `hf_folder` to out/checkpoint and export that to out/hf; one report for each of the
    two folders beside the checkpoint. Raises ConversionError or VerificationError."""
    checkpoint = out / "checkpoint"
    import_hf(hf_folder, checkpoint)
    export_hf(checkpoint, out / "hf")
    reports = []
    for folder in (hf_folder, out / "hf"):
        report = verify(folder, checkpoint, dtype="float64", num_tokens=64)
        report.require_ok()
        reports.append(report)
    return reports


def main(arguments: list[str] | None = None) -> None:
    """Convert and print what was compared."""
    parser = argparse.ArgumentParser(description="Convert a model both ways and compare.")
    parser.add_argument("--model", type=Path, default=TINY_QWEN3)
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        for report in convert_and_verify(options.model, options.out or Path(scratch)):
            print(f"{report.hf_dir}")
            print(f"  {report.tensors.equal} of {report.tensors.compared} tensors are bit-equal")
            if report.logits is not None:
                print(
                    f"  logits of {report.logits.tokens} tokens differ by at most "
                    f"{report.logits.max_rel_diff:.1e} of the largest"
                )
    destroy_parallel()


if __name__ == "__main__":
    main()
