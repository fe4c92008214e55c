"""Functions that the layers and the configuration of a HypeNet share: RoPE, dtypes, the loss, and
the arguments of a call for all layers.

Shapes: b rows, t new tokens, h heads, d head_dim."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_HYPE_DEFAULT = 362.0


class Step(NamedTuple):
    """Arguments for the layers about the new tokens of one call."""

    cos: Tensor  # [b or 1, 1, t, d]
    sin: Tensor
    shared: dict[str, Any]  # by name of a mixer: what its layers compute once per call
    new_real: Tensor | None  # [b, t] bool; None: no padding
    real: Tensor | None  # [b, past + t], in place [b, capacity], bool; None: no padding
    past: int  # columns already in the cache
    at: Tensor | None = None  # [1]: a step in place; their number, for the device alone


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states, positions and the loss: fp64 for an fp64 model, fp32 for all
    others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(
    rule: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compute a recurrence in the dtype of its tensors, also under autocast (Trainer's and TRL's
    `bf16`), which would do its products in bf16 and let the errors add up in the state."""

    @wraps(rule)
    def run(first: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return rule(first, *others)
        with torch.autocast(device, enabled=False):
            return rule(first, *others)

    return run


def is_open(tokens: int) -> bool:
    """Return whether the graph that is being made leaves this number open (a dynamic dimension of
    `torch.export`), so that no Python loop over it can end."""
    return isinstance(tokens, torch.SymInt)


def token_by_token(
    step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *by_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a recurrence as a loop within the graph, for an open number of tokens.

    `step(state, *inputs)` -> (o [b, h, 1, d], new state), with inputs [b, h, 1, ...] of
    `by_token` [b, h, t, ...]; returns o [b, h, t, d] and the last state. RuntimeError where torch
    has no such loop."""
    try:
        from torch._higher_order_ops.scan import scan
    except ImportError as error:
        raise RuntimeError(
            "this torch cannot export a HypeNet with recurrent layers and a dynamic number of "
            "tokens; export it with a fixed number, or with torch 2.7 or later"
        ) from error

    def one(state: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        o, state = step(state, *(x.unsqueeze(2) for x in inputs))
        return state, o.squeeze(2).clone()  # the loop refuses an output that is the state itself

    last, outputs = scan(one, state, tuple(x.movedim(2, 0) for x in by_token))
    return outputs.movedim(0, 2), last


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Return the mean cross entropy of logits [b, t, vocab_size] against the next of labels [b, t],
    or against shift_labels [b, t] as they are.

    Labels equal to `ignore_index` are left out; `num_items_in_batch` replaces the count in the
    mean. ValueError for other shapes."""
    given = labels if shift_labels is None else shift_labels
    if given is None or given.shape != logits.shape[:-1]:
        shape = None if given is None else list(given.shape)
        raise ValueError(
            f"labels must be {list(logits.shape[:-1])}, one per row of logits (leave "
            f"logits_to_keep out), got {shape}"
        )
    if shift_labels is None:
        logits = logits[:, :-1]
        given = given[:, 1:]
    given = given.to(logits.device)
    flat = logits.flatten(0, 1).to(accumulation_dtype(logits.dtype))
    total = F.cross_entropy(flat, given.flatten(), ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        return total / (given != ignore_index).sum()
    return total / (
        num_items_in_batch.to(total.device)
        if torch.is_tensor(num_items_in_batch)
        else num_items_in_batch
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [b, h, t, d] (rotate-half convention), computed in the tables' dtype."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Llama3Scaling(NamedTuple):
    """Settings of RoPE whose long wavelengths are stretched, as Llama 3.1 does it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


def llama3_scaling(settings: dict[str, Any] | None) -> Llama3Scaling | None:
    """Return the scaling that `rope_scaling` or `rope_parameters` of config.json describes, None
    for plain RoPE; ValueError for another one."""
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    kind = given.pop("rope_type", given.get("type", "default"))
    for name in ("type", "rope_theta"):
        given.pop(name, None)
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    if kind == "default" and not given:
        return None
    fits = kind == "llama3" and given.keys() == set(Llama3Scaling._fields)
    if fits and all(type(value) in (int, float) and value > 0 for value in given.values()):
        return Llama3Scaling(**{name: float(value) for name, value in given.items()})
    raise ValueError(
        f"HypeNet has plain RoPE or that of Llama 3 (rope_type llama3 with "
        f"{', '.join(Llama3Scaling._fields)}), got {settings!r}"
    )


def rope_tables(
    head_dim: int,
    theta: float,
    positions: Tensor,
    dtype: torch.dtype,
    scaling: Llama3Scaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos, sin [b or 1, 1, t, d] of positions [b or 1, t]. Angles are computed in fp64 so
    that positions near 10^6 stay exact."""
    angle_dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=angle_dtype)
    frequencies = theta ** (-channels / head_dim)
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = positions[:, None, :, None].to(angle_dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def hype_constant(setting: str | float | None) -> float | None:
    """Return the a of "hype <a>", None for a number or None; ValueError for another setting."""
    if setting is None or (isinstance(setting, int | float) and not isinstance(setting, bool)):
        return None
    try:
        name, _, number = str(setting).strip().partition(" ")
        a = float(number or _HYPE_DEFAULT)
    except ValueError:
        a = math.nan
    if name != "hype" or not 1 < a < math.inf:
        raise ValueError(
            f"attn_logits_scaling must be 'hype <a>' with a > 1, a number or null, got {setting!r}"
        )
    return a
