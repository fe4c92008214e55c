"""Measure the distillation head: student and teacher head products, forward KL and all gradients
(and cross entropy beside it).

    python tools/bench/kd_head.py                 # CUDA; Liger (liger-kernel) for the peers
    python tools/bench/kd_head.py --tiny --out D  # anywhere: tiny shapes, shows that it works
    python tools/bench/kd_head.py --redraw JSON   # table and plot of a saved run

Correctness comes first: gradients near p = q against float64 over the whole vocabulary. Then, on
the same tensors in the same run, time and peak memory of this package, Liger (if installed), plain
torch, and the bare matrix products that no head can avoid. Writes
kd_head_<gpu>_<yyyymm>.{json,csv,md,png} to --out.

One file: a benchmark is run and read by itself."""

import argparse
import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from figures import Panel, bars  # noqa: E402

from megatron_hypenet.parallel.vocab_loss import linear_cross_entropy, linear_kl  # noqa: E402

SHAPES = ((2048, 8192), (2048, 4096), (2048, 16384), (1024, 8192), (4096, 8192))
"""(hidden size, tokens); HypeNet-2B has hidden size 2048."""
Step = Callable[[], tuple[Tensor, ...]]


class Case:
    """Inputs of one shape: a teacher, and a student near it (1% noise on hidden states and
    head)."""

    def __init__(
        self, vocab: int, hidden: int, tokens: int, device: str, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        ht = normal(tokens, hidden)
        wt = normal(vocab, hidden) * (3.0 / hidden**0.5)
        self.teacher_hidden, self.teacher_weight = ht.to(dtype), wt.to(dtype)
        self.hidden = (ht + 1e-2 * normal(tokens, hidden)).to(dtype).requires_grad_()
        wt += wt.std() * 1e-2 * normal(vocab, hidden)
        self.weight = wt.to(dtype).requires_grad_()
        self.labels = torch.randint(0, vocab, (tokens,), generator=generator, device=device)

    def graded(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return the loss with the gradients of hidden states and head."""
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))

    def products(self, loss: str) -> Step:
        """Run the matrix products alone, bf16 in and out, over all tokens at once."""
        h, w = self.hidden.detach(), self.weight.detach()
        logits = torch.empty(h.shape[0], w.shape[0], dtype=h.dtype, device=h.device)
        dh, dw = torch.empty_like(h), torch.empty_like(w)

        def run() -> tuple[Tensor, ...]:
            if loss == "kl":
                torch.mm(self.teacher_hidden, self.teacher_weight.t(), out=logits)
            torch.mm(h, w.t(), out=logits)
            return torch.mm(logits, w, out=dh), torch.mm(logits.t(), h, out=dw)

        return run

    def ours(self, loss: str, chunk: int | None) -> Step:
        """Return a step of this package's head."""
        if loss == "kl":
            return lambda: self.graded(
                linear_kl(
                    self.hidden,
                    self.weight,
                    self.teacher_hidden,
                    self.teacher_weight,
                    chunk_tokens=chunk,
                )
            )
        return lambda: self.graded(
            linear_cross_entropy(self.hidden, self.weight, self.labels, chunk_tokens=chunk)
        )

    def plain(self, loss: str) -> Step:
        """Return a step with full logits and fp32 softmaxes, as the reference code has them."""

        def run() -> tuple[Tensor, ...]:
            student = (self.hidden @ self.weight.t()).float()
            if loss == "ce":
                return self.graded(F.cross_entropy(student, self.labels))
            with torch.no_grad():
                teacher = (self.teacher_hidden @ self.teacher_weight.t()).float().log_softmax(-1)
            return self.graded(
                F.kl_div(student.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
            )

        return run

    def liger(self, loss: str) -> dict[str, Step]:
        """Return Liger's fused heads by name; none when it is not installed."""
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
            from liger_kernel.transformers import (
                LigerFusedLinearCrossEntropyLoss,
                LigerFusedLinearJSD,
            )
        except ImportError:
            return {}
        h = self.hidden
        w = self.weight
        ht = self.teacher_hidden
        wt = self.teacher_weight
        if loss == "ce":
            kinds = {
                f"Liger FLCE, dW {name}": LigerFusedLinearCrossEntropyLoss(accum_dtype=dtype)
                for name, dtype in SUMS.items()
            }
            return {
                name: lambda kind=kind: self.graded(kind(w, h, self.labels))
                for name, kind in kinds.items()
            }
        fused = {
            f"Liger FusedLinearJSD beta=0, dW {name}": LigerFusedLinearJSD(
                jsd_beta=0.0, accum_dtype=t
            )
            for name, t in SUMS.items()
        }
        steps: dict[str, Step] = {
            name: lambda kind=kind: self.graded(kind(h, w, ht, wt, None))
            for name, kind in fused.items()
        }
        chunked = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=True, chunk_size=1024
        )
        steps["Liger chunked JSD beta=0, compiled"] = lambda: self.graded(
            chunked(h, w, ht, wt, self.labels)
        )
        return steps


SUMS = {"bf16": None, "fp32": torch.float32}


def exact(case: Case, loss: str) -> tuple[Tensor, ...]:
    """Return loss and gradients in float64 from the same rounded inputs."""
    h, w = case.hidden.detach().double(), case.weight.detach().double()
    log_q = (h @ w.t()).log_softmax(-1)
    if loss == "kl":
        log_p = (case.teacher_hidden.double() @ case.teacher_weight.double().t()).log_softmax(-1)
        value = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        g = log_q.exp() - log_p.exp()
    else:
        value = F.nll_loss(log_q, case.labels)
        g = log_q.exp()
        g[torch.arange(len(g), device=g.device), case.labels] -= 1
    return value, g @ w / len(h), g.t() @ h / len(h)


def relative(got: Tensor, want: Tensor) -> float:
    """Return the norm of the error over the norm of the answer."""
    return ((got.double() - want).norm() / want.norm()).item()


def measured(step: Step, device: str, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds and peak bytes above what was allocated before the step."""
    step()
    if device == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times), torch.cuda.max_memory_allocated() - before


def steps_of(case: Case, loss: str, chunk: int | None) -> dict[str, Step]:
    """Return every implementation of a loss, ours first."""
    return {"ours": case.ours(loss, chunk), **case.liger(loss), "plain torch": case.plain(loss)}


def errors(vocab: int, hidden: int, tokens: int, device: str, chunk: int) -> list[dict]:
    """Return relative errors of both gradients against float64, several chunks and sums of products
    deep."""
    case = Case(vocab, hidden, tokens, device, torch.bfloat16)
    rows = []
    for loss in ("kl", "ce"):
        want = exact(case, loss)
        for name, step in steps_of(case, loss, chunk).items():
            got = step()
            rows.append(
                {
                    "loss": loss,
                    "name": name,
                    "hidden": hidden,
                    "tokens": tokens,
                    "value": want[0].item(),
                    "value_error": abs(got[0].item() - want[0].item()),
                    "dX_error": relative(got[1], want[1]),
                    "dW_error": relative(got[2], want[2]),
                }
            )
            print(rows[-1], flush=True)
            del got
    return rows


def times(
    vocab: int, hidden: int, tokens: int, device: str, chunk: int | None, repeats: int, peers: bool
) -> list[dict]:
    """Return milliseconds, ratio to the bare products, and peak memory (GB, and without the fp32
    weight gradient) of every implementation."""
    case = Case(vocab, hidden, tokens, device, torch.bfloat16)
    rows = []
    for loss in ("kl", "ce"):
        bare, _ = measured(case.products(loss), device, repeats)
        all_steps = steps_of(case, loss, chunk) if peers else {"ours": case.ours(loss, chunk)}
        rows.append(
            {
                "loss": loss,
                "name": "bare products",
                "hidden": hidden,
                "tokens": tokens,
                "ms": bare,
                "ratio": 1.0,
            }
        )
        rows[-1]["tflops"] = (8 if loss == "kl" else 6) * hidden * vocab * tokens / bare / 1e9
        for name, step in all_steps.items():
            row = {"loss": loss, "name": name, "hidden": hidden, "tokens": tokens}
            try:
                ms, peak = measured(step, device, repeats)
                row |= {
                    "ms": ms,
                    "ratio": ms / bare,
                    "peak_gb": peak / 1e9,
                    "extra_gb": peak / 1e9 - vocab * hidden * 4e-9,
                }
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            rows.append(row)
            print(
                {key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()},
                flush=True,
            )
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def machine(device: str) -> dict:
    """Say where and with what the numbers were taken, with the copy and product rates of the same
    run."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "liger_kernel"):
        try:
            from importlib.metadata import version

            facts[name] = version(name.replace("_", "-"))
        except ImportError:
            facts[name] = "none"
    facts["gpu"] = torch.cuda.get_device_name() if device == "cuda" else "none"
    if device == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        ms, _ = measured(lambda: (a @ a,), device, 20)
        facts["gemm_8192_tflops"] = round(2 * 8192**3 / ms / 1e9, 1)
        big = torch.empty(2**30, device=device, dtype=torch.float32).normal_()
        ms, _ = measured(lambda: (big.clone(),), device, 10)
        facts["copy_tb_per_s"] = round(2 * big.numel() * 4 / ms / 1e9, 2)
    return facts


def table(rows: list[dict]) -> str:
    """Return rows as a Markdown table; columns are the keys of all rows in order."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(x: object) -> str:
        if not isinstance(x, float):
            return str(x)
        return f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"

    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    return "\n".join(
        lines + ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    )


COLUMNS = (
    "hidden: size of both models; ratio: to the bare products of the same run; extra_gb: peak "
    "without the fp32 sum of the weight's\n"
    "gradient. bf16, student = teacher with 1% noise. Errors are relative, of the gradients of "
    "hidden states and weight."
)


def write(record: dict, stem: Path) -> None:
    """Write <stem>.json with everything, .csv with the times, .md to read and .png to look at."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(
            handle, list(dict.fromkeys(key for row in record["times"] for key in row))
        )
        writer.writeheader()
        writer.writerows(record["times"])
    text = "# Distillation head\n" + ", ".join(
        f"{key} {value}" for key, value in record["machine"].items()
    )
    text += "".join(f"\n\n{note}" for note in (COLUMNS, *record.get("notes", [])))
    text += f"\n\n## Errors against float64\n\n{table(record['errors'])}\n\n"
    text += f"## Time and memory, forward and backward\n\n{table(record['times'])}\n"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(record, stem.with_suffix(".png"))


def plot(record: dict, path: Path) -> None:
    """Draw three panels for each loss and shape: time, memory, and the larger gradient error."""
    panels = []
    for loss, hidden, tokens in dict.fromkeys(
        (row["loss"], row["hidden"], row["tokens"]) for row in record["times"]
    ):
        rows = [
            row
            for row in record["times"]
            if (row["loss"], row["hidden"], row["tokens"]) == (loss, hidden, tokens)
        ]
        wrong = {
            row["name"]: max(row["dX_error"], row["dW_error"])
            for row in record["errors"]
            if row["loss"] == loss
        }
        panels.append(
            Panel(
                f"{loss}, hidden {hidden}, {tokens} tokens",
                "ms",
                {row["name"]: row.get("ms") for row in rows},
            )
        )
        panels.append(Panel("", "GB peak", {row["name"]: row.get("peak_gb") for row in rows}))
        panels.append(
            Panel(
                "",
                "% gradient error near p = q",
                {row["name"]: 100 * wrong.get(row["name"], 0.0) for row in rows},
            )
        )
    bars(
        path,
        f"Distillation head, {record['machine']['gpu']}, {record['machine']['date']}",
        panels,
        columns=3,
    )


def stem_of(out: Path, facts: dict) -> Path:
    """Return OUT/kd_head_<gpu>_<yyyymm>, without suffix."""
    gpu = facts["gpu"].replace("NVIDIA ", "").split()[0].lower()
    return out / f"kd_head_{'cpu' if gpu == 'none' else gpu}_{facts['date'][:7].replace('-', '')}"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, check, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, no peers; the default without a GPU"
    )
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="JSON",
        help="measure nothing: write table and plot of a saved run, into --out",
    )
    parser.add_argument("--chunk-tokens", type=int, default=None)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of the shapes, in order"
    )
    args = parser.parse_args(argv)
    if args.redraw:
        record = json.loads(args.redraw.read_text(encoding="utf-8"))
        write(record, stem_of(args.out, record["machine"]))
        return 0
    if args.tiny or not torch.cuda.is_available():
        facts = machine("cpu")
        wrong = errors(503, 32, 24, "cpu", 8)
        timed = times(503, 32, 24, "cpu", 8, 1, False)
        write({"machine": facts, "errors": wrong, "times": timed}, stem_of(args.out, facts))
        return 0
    facts = machine("cuda")
    print(facts, flush=True)
    wrong = errors(151_936, 2048, 512, "cuda", 128)
    timed = []
    for hidden, tokens in SHAPES[: args.shapes]:
        timed += times(151_936, hidden, tokens, "cuda", args.chunk_tokens, 7, not args.no_peers)
        write({"machine": facts, "errors": wrong, "times": timed}, stem_of(args.out, facts))
    print(table(timed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
