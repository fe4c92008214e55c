"""Exported modelling code at HypeNet-2B's size with random bf16 weights: prefill and decoding.

    python tools/bench/decode.py --out D            # one GPU of 80 GB, about 6 minutes
    python tools/bench/decode.py --out D --tiny     # anywhere: a small model, short texts

Accuracy first: a small model's greedy tokens and logits, through CUDA graphs and plainly, against
the CPU in float64. Then per context length: seconds of the prompt (first call with that length, and
again), milliseconds per token of `generate` (the median gap between its tokens), of a bare loop of
forward calls, of the same loop without graphs, and of the plain code before graphs; peak memory;
whether graph and plain steps agree. The floor is (2 bytes x parameters + keys and values + states)
at 3.0 TB/s. Then the attention kernel with other blocks, and which kernels a step and a prompt
spend their time in. Writes decode_<gpu>_<yyyymm>.{json,md} to --out."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fresh_process import report  # noqa: E402
from random_stage import model_config  # noqa: E402

from megatron_hypenet.checkpoint.manifest import library_versions  # noqa: E402
from megatron_hypenet.export.hf_config import hf_config_from_model  # noqa: E402
from megatron_hypenet.export.hf_remote import kernels_hypenet as kernels  # noqa: E402
from megatron_hypenet.export.hf_remote import modeling_hypenet as modeling  # noqa: E402
from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig  # noqa: E402

Row = dict[str, Any]
BYTES_PER_SECOND = 3.0e12
GENERATED = 48
LOOPED = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_model(tiny: bool, dtype: torch.dtype, device: str) -> Any:
    """Build HypeNet-2B, or four layers of 64 channels, with random weights."""
    sizes = hf_config_from_model(model_config("hypenet_2b"), torch_dtype="bfloat16")
    sizes["attn_logits_scaling"] = "hype 500"
    if tiny:
        layers = 4
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 211}
        sizes |= {"num_hidden_layers": layers, "mixer_types": sizes["mixer_types"][:layers]}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        sizes |= {name: 4 for name in ("lightning_nh", "lightning_nkv") if name in sizes}
        sizes |= {name: 32 for name in ("lightning_head_dim",) if name in sizes}
        sizes |= {"bos_token_id": 0, "eos_token_id": None}
    torch.manual_seed(1)
    config = HypeNetConfig(**sizes)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = modeling.HypeNetForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    scale = 4.0 if tiny else 1.0  # logits that differ by more than rounding
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02 * scale)
    return model.to(device, dtype)


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of a call with all that it launches, and its result."""
    synchronize()
    begin = time.perf_counter()
    found = call()
    synchronize()
    return time.perf_counter() - begin, found


class Clock:
    """A streamer that notes when each token has arrived on the host."""

    def __init__(self) -> None:
        """Begin without tokens."""
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take one token, which `generate` has moved to the CPU."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing more."""

    def gaps(self) -> list[float]:
        """Return the milliseconds between tokens."""
        after = self.times[1:]
        return [1e3 * (b - a) for a, b in zip(after, after[1:], strict=False)]


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


@torch.inference_mode()
def loop(model: Any, cache: Any, ids: torch.Tensor, count: int) -> tuple[list[float], Any, Any]:
    """Generate `count` greedy tokens by forward calls alone: milliseconds of each, tokens, last
    logits."""
    times = []
    tokens = []
    for _ in range(count):
        took, out = seconds(lambda: model(ids, past_key_values=cache))  # noqa: B023
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        times.append(took * 1e3)
        tokens.append(ids)
    return times, torch.cat(tokens, 1), out.logits.float()


def both_ways(model: Any, cache: Any, ids: torch.Tensor, count: int) -> Row:
    """Generate the same tokens through a graph, by plain steps in place, and by the plain code."""
    row: Row = {}
    found = {}
    for way, graph, devices in (
        ("loop", True, modeling._IN_PLACE_DEVICES),
        ("no graph", False, modeling._IN_PLACE_DEVICES),
        ("plain", False, ()),
    ):
        before = modeling._IN_PLACE_DEVICES
        modeling._IN_PLACE_DEVICES = devices
        model.use_cuda_graph = graph
        own = copy.deepcopy(cache)
        times, tokens, logits = loop(model, own, ids, count if graph else 8)
        if graph:
            row["captured"] = own.steps.graph is not None
            row["capture ms"] = max(times[2:4])
            times = times[4:]
        row[f"{way} ms"] = median(times)
        found[way] = tokens, logits, own
        if way != "loop":
            row[f"tokens equal, {way}"] = torch.equal(tokens, found["loop"][0][:, :8])
        modeling._IN_PLACE_DEVICES = before
        model.use_cuda_graph = True
        del own
    return row


@torch.inference_mode()
def context_row(model: Any, t: int, *, floor_bytes: float) -> Row:
    """Measure one context length."""
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (1, t), generator=torch.Generator().manual_seed(t)).to(DEVICE)
    row: Row = {"context": t}
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for key in ("prefill first s", "prefill s"):
        cache = None
        row[key], out = seconds(lambda: model(ids, logits_to_keep=1, use_cache=True))
        cache = out[modeling.CACHE]
        row["finite"] = bool(torch.isfinite(out.logits).all())
        first = out.logits[:, -1].argmax(-1, keepdim=True)
        del out
    if DEVICE == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    columns = sum(
        2 * t * slot.keys[0, :, 0].nbytes for slot in cache.slots if hasattr(slot, "keys")
    )
    states = sum(
        2 * slot.state.nbytes for slot in cache.slots if getattr(slot, "state", None) is not None
    )
    row["floor ms"] = 1e3 * (floor_bytes + columns + states) / BYTES_PER_SECOND
    row |= both_ways(model, cache, first, LOOPED)
    clock = Clock()
    model.generate(
        torch.cat([ids, first], 1),
        attention_mask=torch.ones(1, t + 1, device=DEVICE),
        max_new_tokens=GENERATED,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
        **{modeling.CACHE: cache},
    )
    row["generate ms"] = median(clock.gaps()[6:])
    row["x floor"] = row["generate ms"] / row["floor ms"]
    return row


@torch.inference_mode()
def accuracy(dtype: torch.dtype) -> Row:
    """Compare a small model on this device with the CPU in float64: prompt, padding, greedy
    tokens."""
    exact = random_model(True, torch.float64, "cpu")
    model = random_model(True, torch.float64, "cpu").to(DEVICE, dtype)
    exact.load_state_dict({name: x.double().cpu() for name, x in model.state_dict().items()})
    ids = torch.randint(211, (2, 700), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :130] = 0
    row: Row = {"accuracy": str(dtype).removeprefix("torch.")}
    for name, given in (("unpadded", torch.ones_like(ids)), ("padded", mask)):
        options: Row = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        out = model.generate(
            ids.to(DEVICE),
            attention_mask=given.to(DEVICE),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        full = torch.cat([given, torch.ones(2, 24, dtype=given.dtype)], 1)[:, :-1]
        want = exact(out.sequences[:, :-1].cpu(), attention_mask=full, use_cache=False).logits
        got = torch.stack(out.logits, 1).double().cpu()
        want = want[:, -24:]
        row[f"{name} error"] = ((got - want).norm() / want.norm()).item()
        row[f"{name} same tokens"] = (got.argmax(-1) == want.argmax(-1)).double().mean().item()
        row[f"{name} captured"] = out[modeling.CACHE].steps.graph is not None
    pieces = [ids.to(DEVICE)[:, :512], ids.to(DEVICE)[:, 512:]]
    first = model(pieces[0], use_cache=True)
    second = model(pieces[1], past_key_values=first[modeling.CACHE]).logits
    want = exact(ids, use_cache=False).logits
    row["pieces error"] = ((second.double().cpu() - want[:, 512:]).norm() / want.norm()).item()
    return row


def sweep(t: int) -> list[Row]:
    """Time the attention kernel of one token with other blocks."""
    import triton.testing

    rows: list[Row] = []
    q = torch.randn(1, 16, 1, 128, device=DEVICE).bfloat16()
    k, v = torch.randn(2, 1, 8, t, 128, device=DEVICE, dtype=torch.bfloat16)
    at = torch.tensor([t - 1], device=DEVICE)
    before = kernels._BLOCK_COLUMNS, kernels._PROGRAMS, kernels._WARPS, kernels._STAGES
    for block in (32, 64, 128):
        for programs in (256, 512, 1024):
            for warps, stages in ((2, 3), (4, 2), (4, 3), (4, 4), (8, 3)):
                kernels._BLOCK_COLUMNS, kernels._PROGRAMS = block, programs
                kernels._WARPS, kernels._STAGES = warps, stages
                row: Row = {"block": block, "programs": programs, "warps": warps, "stages": stages}
                try:
                    ms = triton.testing.do_bench(
                        lambda: kernels.attend_in_place(q, k, v, at, None), warmup=5, rep=20
                    )
                    row |= {"ms": ms, "TB/s": 2 * k.nbytes / ms / 1e9}
                except Exception as error:  # too much shared memory, for instance
                    row["note"] = type(error).__name__
                rows.append(row)
    kernels._BLOCK_COLUMNS, kernels._PROGRAMS, kernels._WARPS, kernels._STAGES = before
    return sorted(rows, key=lambda row: row.get("ms", 1e9))[:12]


def profile(call: Callable[[], Any], name: str) -> Row:
    """Return the kernels of a call by their time on the GPU, in milliseconds."""
    from torch.profiler import ProfilerActivity

    call()
    synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        synchronize()
    kinds = [
        (event.key[:90], round(event.self_device_time_total / 1e3, 3), event.count)
        for event in found.key_averages()
        if event.self_device_time_total > 0
    ]
    kinds.sort(key=lambda kind: -kind[1])
    total = sum(kind[1] for kind in kinds)
    return {"profile": name, "total ms": total, "kernels": kinds[:28]}


@torch.inference_mode()
def profiles(model: Any, t: int) -> list[Row]:
    """Profile a prompt of t tokens, and one token after it."""
    ids = torch.randint(model.config.vocab_size, (1, t), device=DEVICE)
    rows = [profile(lambda: model(ids, logits_to_keep=1, use_cache=True), f"prompt of {t}")]
    cache = model(ids, logits_to_keep=1, use_cache=True)[modeling.CACHE]
    for _ in range(5):
        model(ids[:, :1], past_key_values=cache)
    rows.append(profile(lambda: model(ids[:, :1], past_key_values=cache), f"a token after {t}"))
    return rows


def table(results: Sequence[Row]) -> str:
    """Return the rows by kind, as Markdown."""
    versions = next((row["versions"] for row in results if "versions" in row), {})
    lines = ["# Decoding of an exported folder", ""]
    lines += [", ".join(f"{key} {value}" for key, value in versions.items()), ""]
    for kind in ("accuracy", "context", "block"):
        rows = [row for row in results if kind in row]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        if not rows:
            continue
        lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        for row in rows:
            cells = (row.get(key, "") for key in keys)
            shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells)
            lines.append("| " + " | ".join(shown) + " |")
        lines.append("")
    for row in results:
        if "profile" in row:
            lines += [f"{row['profile']}: {row['total ms']:.3f} ms", ""]
            lines += [f"    {ms:9.3f} ms {count:6d} x {name}" for name, ms, count in row["kernels"]]
            lines.append("")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--context", type=int, action="append", help="only these lengths")
    options = parser.parse_args()
    results: list[Row] = [{"versions": library_versions()}]
    if DEVICE == "cuda":
        results.append({"device": torch.cuda.get_device_name()})

    def add(case: Row, call: Callable[[], Row | list[Row]]) -> None:
        try:
            found = call()
        except Exception as error:  # one row must not end the others
            found = case | {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
        for row in found if isinstance(found, list) else [found]:
            results.append(row)
            print(json.dumps(row), flush=True)

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for dtype in dtypes[:1] if DEVICE == "cpu" else dtypes:
        add({"accuracy": str(dtype)}, lambda dtype=dtype: accuracy(dtype))  # type: ignore[misc]
    if DEVICE == "cuda" and not options.tiny:
        add({"block": 0}, lambda: sweep(131_072))
    model = random_model(options.tiny, torch.bfloat16, DEVICE)
    parameters = sum(x.nbytes for x in model.parameters())
    lengths = options.context or (
        (300,) if options.tiny else (2048, 16_384, 131_072, 200_003, 262_144)
    )
    for t in lengths:
        add({"context": t}, lambda t=t: context_row(model, t, floor_bytes=parameters))  # type: ignore[misc]
    if DEVICE == "cuda":
        for t in (300,) if options.tiny else (16_384, 131_072):
            add({"profile": t}, lambda t=t: profiles(model, t))  # type: ignore[misc]
    report(results, table, options.out, "decode")


if __name__ == "__main__":
    main()
