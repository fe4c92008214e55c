"""Load a model and score a text: the loss per token in nats, and the tokens that cost most.

    python examples/load_and_score.py
    python examples/load_and_score.py --model runs/demo/finetune --text "Water flows downhill."

`--model` is a Hugging Face folder (Qwen3 or HypeNet) or a checkpoint of this package. A Hugging
Face folder is imported into a temporary checkpoint first, because models are built by Megatron-core
and read Megatron's format."""

import argparse
import tempfile
from pathlib import Path

import torch

from megatron_hypenet.checkpoint.load import load_model, read_whole_config, resolve, tokenizer_dir
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.data.tokenizer import encode, load_tokenizer
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.model.hypenet import HypeNetModel, build_model
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.parallel.groups import destroy_parallel

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_QWEN3 = REPOSITORY / "assets" / "tiny-qwen3"


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> HypeNetModel:
    """Return the model of a checkpoint on one process, ready to evaluate; the weights must match
    its shape exactly."""
    model = build_model(read_whole_config(checkpoint), ParallelConfig(), dtype=dtype)
    load_model(model, checkpoint)
    return model.eval()


def main(arguments: list[str] | None = None) -> float:
    """Print the mean loss and the most surprising tokens of a text; returns the mean loss."""
    parser = argparse.ArgumentParser(description="Score a text with a model.")
    parser.add_argument("--model", type=Path, default=TINY_QWEN3)
    parser.add_argument("--text", help="default: the start of the bundled held-out text")
    options = parser.parse_args(arguments)
    text = options.text
    if text is None:
        text = (TINY_QWEN3 / "heldout.txt").read_text(encoding="utf-8")[:800]

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.model
        if (checkpoint / "config.json").is_file():
            checkpoint = Path(scratch) / "checkpoint"
            import_hf(options.model, checkpoint)
        model = load(checkpoint)
        # the tokenizer travels with the checkpoint
        tokenizer = load_tokenizer(tokenizer_dir(resolve(checkpoint)))

    ids = torch.tensor([encode(tokenizer, text)], device=device())  # [1, t]
    nll, is_first_choice = model.token_scores(ids)  # [1, t - 1] each, for tokens 1 .. t - 1
    print(f"{ids.shape[1]} tokens, loss {nll.mean():.4f} nats per token")
    print(f"{100 * is_first_choice.float().mean():.1f} % of them were the model's first choice")
    for place in nll[0].topk(min(5, nll.shape[1])).indices.tolist():
        token = tokenizer.decode([ids[0, place + 1].item()])
        print(f"  token {place + 1:>4}  {nll[0, place]:7.3f} nats  {token!r}")
    destroy_parallel()
    return float(nll.mean())


if __name__ == "__main__":
    main()
