"""Verify that a Hugging Face folder and a checkpoint hold the same model: equal bits, equal logits
from two implementations, and equal log-probabilities from what serves it.

transformers runs the folder (its own model of a teacher, or this package's copy of the exported
modelling code), Megatron-core runs the checkpoint, both on the same random token ids. Code that
came with the folder is never run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint import load
from megatron_hypenet.checkpoint.ordered_work import one_thread_per_operation, run_in_order
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.checkpoint.stream import Meter, default_workers
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import VerificationError
from megatron_hypenet.export import hf_folder, layerwise, mapping, parity
from megatron_hypenet.export.plan import ImportPlan, plan_import
from megatron_hypenet.export.tensors import BLOCK_VALUES, SCRATCH, parse_dtype

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}
"""Largest accepted difference of logits, relative to the largest logit, by compute dtype. Both
sides sum in different orders; Megatron's RoPE tables are fp32 in every dtype. Measured on the
golden models: 4e-7 in float64, 2e-6 in float32."""
_TINY = torch.finfo(torch.float64).tiny
_TOKENS = 16
"""Number of tokens whose logits are compared at a time, in float64."""
_COSMETIC = (
    "attn_logits_scaling",
    "max_position_embeddings",
    "init_method_std",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that may differ between a checkpoint and its export; logits are compared with the
folder's logit scaling."""


@dataclass
class TensorReport:
    """Outcome of the bitwise comparison."""

    compared: int = 0
    equal: int = 0
    cast: int = 0
    """Tensors stored in different dtypes, compared after casting the wider to the narrower."""
    cast_to: str | None = None
    """The narrowest dtype that a tensor was cast to: the logits are compared with the weights of
    both sides rounded to it."""
    different: list[str] = field(default_factory=list)
    """Hugging Face names of tensors whose values differ."""


@dataclass
class LogitsReport:
    """Outcome of running both models; differences are relative to the largest reference value."""

    dtype: str
    tokens: int
    max_abs_diff: float
    max_rel_diff: float
    cosine: float
    top1_agreement: float
    tolerance: float
    first_diverging: str | None
    """First place where the hidden states differ, None when they agree everywhere."""

    @property
    def ok(self) -> bool:
        """Return whether logits and hidden states agree within the tolerance. NaN never does."""
        return self.max_rel_diff <= self.tolerance and self.first_diverging is None


@dataclass
class Report:
    """Everything that was compared."""

    hf_dir: str
    ckpt_dir: str
    config_differences: list[str]
    notes: list[str]
    """Differences that are allowed, such as another logit scaling."""
    tensors: TensorReport
    logits: LogitsReport | None
    bound: float | None = None
    """Largest accepted difference of a log-probability, in nats."""
    ways: list[parity.Way] = field(default_factory=list)
    """What serves the folder, beside the training model."""
    served_diverging: str | None = None
    """First place where the hidden states of an engine differ."""

    @property
    def ok(self) -> bool:
        """Return whether all comparisons that were made agree."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return what differs, one line each."""
        lines = [f"configuration: {line}" for line in self.config_differences]
        if self.tensors.different:
            first = ", ".join(self.tensors.different[:3])
            lines.append(
                f"{len(self.tensors.different)} of {self.tensors.compared} tensors differ, "
                f"first {first}"
            )
        if self.logits is not None and not self.logits.ok:
            where = (
                f", hidden states part at {self.logits.first_diverging}"
                if self.logits.first_diverging
                else ""
            )
            lines.append(
                f"logits differ by {self.logits.max_rel_diff:.3g} of the largest logit (limit "
                f"{self.logits.tolerance:g} in"
                f" {self.logits.dtype}), top-1 agreement {100 * self.logits.top1_agreement:.2f} "
                f"%{where}"
            )
        return lines + self._beyond()

    def _beyond(self) -> list[str]:
        """Return what is beyond the bound, and where it begins."""
        lines = [
            f"{way.engine}, {way.way}: a log-probability differs by {way.max_diff:.3g} nats "
            f"(bound {self.bound:g}), {way.worst}"
            for way in self.ways
            if not way.ok
        ]
        if lines and self.served_diverging is not None:
            lines.append(f"hidden states of the engine part at {self.served_diverging}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON, with the result as `ok`."""
        return {"ok": self.ok, **asdict(self)}

    def require_ok(self) -> None:
        """Raise VerificationError that names what differs, if anything does."""
        if not self.ok:
            lines = "\n  ".join(self.problems())
            raise VerificationError(
                f"{self.hf_dir} and {self.ckpt_dir} are not the same model:\n  {lines}\nimport or "
                "export again"
            )


def verify(
    hf_dir: Path | str,
    ckpt_dir: Path | str,
    *,
    dtype: str = "float32",
    num_tokens: int = 128,
    seed: int = 1234,
    logits: bool = True,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
    served: Sequence[parity.Served] = (),
    rows: Tensor | None = None,
    bound: float | None = None,
) -> Report:
    """Compare configuration and tensors, then (with `logits`) both models' logits on 2 x
    `num_tokens` random token ids in `dtype`, or on `rows` [b, t] where they are given, and what
    `served` answers about these rows, within `bound` nats (None: that of `dtype`). `workers`
    threads read (None: as many as suit the machine).

    Raises ConversionError, ConfigError or CheckpointError when a side cannot be read; differences
    are in the report."""
    say = progress or (lambda line: None)
    plan = plan_import(Path(hf_dir))
    folder = load.resolve(Path(ckpt_dir))
    different, notes = compare_configs(plan.config, load.read_model_config(folder))
    say(f"comparing {len(plan.entries)} tensors of {folder} with {hf_dir}")
    tensors = compare_tensors(plan, folder, workers=workers, progress=progress)
    report = Report(str(hf_dir), str(folder), different, notes, tensors, None)
    # two models of different shape cannot be run side by side; the report already says so
    if logits and not different:
        ids = random_rows(plan.config.vocab_size, num_tokens, seed) if rows is None else rows
        say(f"running the checkpoint in Megatron-core ({dtype})")
        rounded = None if tensors.cast_to is None else parse_dtype(tensors.cast_to)
        ours = layerwise.run_checkpoint(folder, plan.config, ids, dtype, rounded)
        say(f"running the folder in transformers ({dtype})")
        theirs = layerwise.run_hf(plan, ids, dtype, rounded)
        report.logits = compare_logits(theirs, ours, dtype)
        report.bound = parity.BOUND[dtype] if bound is None else bound
        for one in served:
            say(f"on all ways: {one.name} ({dtype})")
            _compare_served(report, one, ids, ours)
    return report


def random_rows(vocab_size: int, num_tokens: int, seed: int) -> Tensor:
    """Return token ids [2, num_tokens]."""
    return torch.randint(vocab_size, (2, num_tokens), generator=torch.Generator().manual_seed(seed))


def _compare_served(report: Report, served: parity.Served, ids: Tensor, ours: list[Tensor]) -> None:
    """Add what `served` answers to the report, and the first layer that differs where it can be
    found."""
    assert report.bound is not None and report.logits is not None
    ways = parity.compare(served.name, served.answers(ids), ours[-1], report.bound)
    report.ways += ways
    if all(way.ok for way in ways):
        return
    states = served.states(ids[0])
    if states is not None:
        length = len(states[0])
        wanted = [state[0, :length].float() for state in ours[:-1]]
        report.served_diverging = first_difference(wanted, states, report.logits.tolerance)


def compare_configs(folder: ModelConfig, checkpoint: ModelConfig) -> tuple[list[str], list[str]]:
    """Return (differences that change the model, differences that may be), one line each."""
    lines: tuple[list[str], list[str]] = ([], [])
    for name in ModelConfig.model_fields:
        theirs, ours = getattr(folder, name), getattr(checkpoint, name)
        if theirs != ours:
            lines[name in _COSMETIC].append(f"{name}: folder {theirs!r}, checkpoint {ours!r}")
    return lines


def compare_tensors(
    plan: ImportPlan,
    folder: Path,
    *,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> TensorReport:
    """Compare bit by bit, in blocks that several threads read. ConversionError when the
    checkpoint's names are not those of the folder's model."""
    reader = load.open_weights(folder, hashes=False)
    mapping.check_names((entry.ours for entry in plan.entries), reader, where=str(folder))
    for entry in plan.entries:
        mapping.check_shape(entry.ours, reader.shape(entry.ours), entry.shape, where=str(folder))
    parts = [
        _Part(plan, reader, entry, at) for entry in plan.entries for at in range(len(entry.hf))
    ]
    blocks = [(part, first, count) for part in parts for first, count in part.blocks()]
    meter = Meter(sum(part.num_bytes for part in parts), progress, "compared")
    different: set[str] = set()

    def compare(index: int, _: memoryview) -> int:
        part, first, count = blocks[index]
        if not part.same(first, count):
            different.add(part.name)
        return 0

    def count_block(index: int, _: memoryview) -> None:
        part, _first, count = blocks[index]
        meter.add(count * part.theirs.itemsize)

    threads = workers or default_workers()
    with load.comparing_hashes(folder), one_thread_per_operation():
        run_in_order(len(blocks), compare, count_block, workers=threads, buffer_bytes=0)
    casts = [part.smaller for part in parts if part.theirs != part.ours]
    report = TensorReport(
        compared=len(parts),
        equal=len(parts) - len(different),
        cast=len(casts),
        different=[part.name for part in parts if part.name in different],
    )
    if casts:
        report.cast_to = str(min(casts, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    return report


class _Part:
    """One tensor of the folder and the part of the checkpoint's tensor that it is, read in
    blocks."""

    def __init__(
        self, plan: ImportPlan, reader: ShardReader, entry: mapping.Entry, at: int
    ) -> None:
        self.name = entry.hf[at]
        self.weights = plan.weights
        self.reader = reader
        self.entry = entry
        self.num_values = math.prod(entry.part_shape)
        self.start = at * self.num_values
        self.theirs = parse_dtype(hf_folder.DTYPES[plan.weights.dtype(self.name)])
        self.ours = reader.dtype(entry.ours)
        self.smaller = min(self.theirs, self.ours, key=lambda dtype: dtype.itemsize)
        self.num_bytes = self.num_values * self.theirs.itemsize

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (first value, number of values) of each block."""
        unit = self.reader.unit(self.entry.ours)
        step = max(unit, BLOCK_VALUES // unit * unit)
        for first in range(0, self.num_values, step):
            yield first, min(step, self.num_values - first)

    def same(self, first: int, count: int) -> bool:
        """Return whether a block has equal bits on both sides, after a cast to the smaller
        dtype."""
        theirs, ours = (
            scratch.take(count, dtype)
            for scratch, dtype in zip(SCRATCH, (self.theirs, self.ours), strict=True)
        )
        self.weights.read_values(self.name, first, theirs)
        self.reader.read_values(self.entry.ours, self.start + first, ours)
        return same_bits(theirs.to(self.smaller), ours.to(self.smaller))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit for bit: unlike in torch.equal, NaN equals itself and 0 differs from -0."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def compare_logits(reference: list[Tensor], found: list[Tensor], dtype: str) -> LogitsReport:
    """Compare what `run_hf` and `run_checkpoint` of layerwise.py returned; both end with logits
    [b, t, vocab]."""
    if len(reference) != len(found):
        raise VerificationError(
            f"the folder's model gave {len(reference) - 1} hidden states, "
            f"the checkpoint's {len(found) - 1}"
        )
    tolerance = TOLERANCE[dtype]
    first = first_difference(reference[:-1], found[:-1], tolerance)
    theirs, ours = (states[-1].flatten(0, -2) for states in (reference, found))
    parts = [
        _differences(*pair) for pair in zip(theirs.split(_TOKENS), ours.split(_TOKENS), strict=True)
    ]
    largest, scale, cosine, agreeing = (torch.stack(column) for column in zip(*parts, strict=True))
    return LogitsReport(
        dtype=dtype,
        tokens=len(theirs),
        max_abs_diff=float(largest.max()),
        max_rel_diff=float(largest.max() / scale.max().clamp(min=_TINY)),
        cosine=float(cosine.min()),
        top1_agreement=float(agreeing.sum() / len(theirs)),
        tolerance=tolerance,
        first_diverging=first,
    )


def first_difference(
    reference: Sequence[Tensor], found: Sequence[Tensor], tolerance: float
) -> str | None:
    """Return the first place where hidden states differ (after the embedding, each layer, the final
    norm) by more than `tolerance` of the largest, or None."""
    places = [
        "the embedding",
        *(f"layer {layer}" for layer in range(len(found) - 2)),
        f"layer {len(found) - 2} or the final norm",
    ]
    for place, theirs, ours in zip(places, reference, found, strict=True):
        if not _relative(theirs, ours) <= tolerance:
            return place
    return None


def _differences(theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the largest difference, the largest reference value, the least cosine and the number
    of equal first choices of the logits of some tokens, in float64."""
    theirs, ours = theirs.double(), ours.double()
    return (
        (theirs - ours).abs().max(),
        theirs.abs().max(),
        torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).min(),
        (theirs.argmax(-1) == ours.argmax(-1)).double().sum(),
    )


def _relative(reference: Tensor, found: Tensor) -> float:
    reference, found = reference.double(), found.double()
    return float((reference - found).abs().max() / reference.abs().max().clamp(min=_TINY))
