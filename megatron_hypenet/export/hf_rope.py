"""RoPE in Hugging Face's config.json: plain, scaled by Llama 3's rule, or YaRN.

Both spellings are read: transformers 4 has `rope_theta` and `rope_scaling` beside each other,
transformers 5 `rope_parameters`. The former is written, since both versions read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_hypenet.config.rope import SCALED_ROPE_TYPES, RopeScaling
from megatron_hypenet.untrusted.files import findings, shown

_SCALING: TypeAdapter[RopeScaling] = TypeAdapter(RopeScaling)
_HARMLESS = {"partial_rotary_factor": 1.0, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""Keys of the dictionary that may be there with this value or null, which changes nothing."""
_PLAIN = "default"
_SUPPORTED = (
    "supported is plain RoPE, null or {'rope_type': 'default', 'rope_theta': <theta>}, "
    f"and rope_type {' or '.join(SCALED_ROPE_TYPES)}"
)


def read_rope(
    raw: Mapping[str, Any], problems: list[str], *, default_theta: float | None = None
) -> tuple[float, RopeScaling | None]:
    """Return RoPE's theta and its scaling; what is not supported goes to `problems`.
    `default_theta` is that of a family whose config.json may leave it out."""
    thetas: set[float] = set()
    scalings: dict[str, RopeScaling | None] = {}
    before = len(problems)
    _add_theta("rope_theta", raw.get("rope_theta"), thetas, problems)
    for key in ("rope_parameters", "rope_scaling"):
        value = raw.get(key)
        if value is None:
            continue
        if isinstance(value, dict):
            _add_theta(f"rope_theta of {key}", value.get("rope_theta"), thetas, problems)
        scalings[key] = _scaling(key, value, problems)
    _check_length(raw, scalings, problems)
    broken = len(problems) > before
    if broken and not thetas:
        return 1.0, None  # an unknown form may or may not have a theta
    if not broken and len({repr(scaling) for scaling in scalings.values()}) > 1:
        problems.append("rope_scaling and rope_parameters differ; give one of them")
    if not thetas and default_theta is not None:
        thetas.add(default_theta)
    if len(thetas) != 1:
        stated = f"states different values {sorted(thetas)}" if thetas else "is missing"
        problems.append(f"rope_theta {stated}; give it once, as rope_theta or in rope_parameters")
        return 1.0, None
    return thetas.pop(), next(iter(scalings.values()), None)


def written_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the keys of config.json that `read_rope` reads; a theta that is whole as an integer,
    as published files have it."""
    whole = int(theta) if float(theta).is_integer() else theta
    given = None if scaling is None else scaling.model_dump(exclude_none=True)
    return {"rope_theta": whole, "rope_scaling": given}


def _add_theta(name: str, value: object, thetas: set[float], problems: list[str]) -> None:
    """Add a theta that is there, or what is wrong with it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        thetas.add(float(value))
    elif value is not None:
        problems.append(f"{name} = {_told(value)}: expected a number")


def _scaling(key: str, value: object, problems: list[str]) -> RopeScaling | None:
    """Return the scaling that a dictionary of config.json describes, None for plain RoPE."""
    if not isinstance(value, dict):
        problems.append(f"{key} = {_told(value)}: {_SUPPORTED}")
        return None
    kind = value.get("rope_type", value.get("type", _PLAIN))
    settings = {
        name: setting
        for name, setting in value.items()
        if setting is not None
        and name not in ("rope_type", "type", "rope_theta")
        and not (name in _HARMLESS and _same(setting, _HARMLESS[name]))
    }
    if value.get("type", kind) != kind or (kind == _PLAIN and settings):
        problems.append(f"{key} = {_told(value)}: {_SUPPORTED}")
        return None
    if kind == _PLAIN:
        return None
    if kind not in SCALED_ROPE_TYPES:
        problems.append(f"{key} = {_told(value)}: {_SUPPORTED}")
        return None
    try:
        return _SCALING.validate_python({**settings, "rope_type": kind})
    except ValidationError as error:
        problems += [
            f"{key} = {_told(value)}: {line.removeprefix(f'{kind}.')}"
            for line in findings(error, whole=key)
        ]
        return None


def _check_length(
    raw: Mapping[str, Any], scalings: Mapping[str, RopeScaling | None], problems: list[str]
) -> None:
    """Refuse a second `original_max_position_embeddings` beside the dictionary, which transformers
    5 prefers to the one inside and transformers 4 does not read."""
    beside = raw.get("original_max_position_embeddings")
    for key, scaling in scalings.items():
        if scaling is None or beside is None:
            continue
        if beside != scaling.original_max_position_embeddings:
            problems.append(
                f"original_max_position_embeddings = {_told(beside)}: supported is "
                f"{scaling.original_max_position_embeddings}, its value in {key}"
            )


def _same(value: object, supported: object) -> bool:
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)


def _told(value: object) -> str:
    return shown(repr(value), 120)
