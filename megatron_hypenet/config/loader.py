"""YAML files and command-line overrides -> RunConfig, with every problem listed at once.

Precedence, later wins: defaults of the schema < files named by `include:` (left to right) < the
file itself < KEY=VALUE overrides. Sections merge key by key; any other value replaces what was
there. Relative paths are taken from the current directory; a path that starts with `assets/` or
`configs/` and is not found there is taken from what comes with this package, and so is a name of a
preset (`quickstart`) in the place of a file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from megatron_hypenet.config.bundled import bundled, preset
from megatron_hypenet.config.meaning import YAML, as_meant, from_word, member
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.paths import expanded
from megatron_hypenet.config.problems import Origins, describe
from megatron_hypenet.config.schema import RunConfig, SourceConfig
from megatron_hypenet.errors import ConfigError
from megatron_hypenet.untrusted import yaml_text
from megatron_hypenet.untrusted.files import shown
from megatron_hypenet.untrusted.yaml_text import value_of

Kind = TypeVar("Kind", bound=BaseModel)

CLI = "CLI"

# `data=corpus.txt` on the command line means the training files; the other keys of the section keep
# their long names.
SUGAR = {"data": "data.train"}
LIST_KEYS = frozenset({"data.train"})
_LISTS = {("data",): "train"}
"""Sections for which a list stands for one of their keys, in files too."""

_MOST_PROBLEMS = 100
"""Largest number of problems that one message lists."""


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, its includes and `overrides` (`key.sub=value`); ConfigError lists everything
    wrong, each with its origin."""
    return load_with_origins(path, overrides)[0]


def load_with_origins(path: Path | str, overrides: Sequence[str] = ()) -> tuple[RunConfig, Origins]:
    """Load as `load_run_config` does, and return the file or CLI that set each key; keys that are
    not in it have their default."""
    config, origins = load_as(RunConfig, path, overrides)
    return _resolve_bundled(config), origins


def load_as(
    root: type[Kind], path: Path | str, overrides: Sequence[str] = ()
) -> tuple[Kind, Origins]:
    """Return a configuration of class `root` by the rules above, and where each key was set;
    ConfigError lists everything wrong."""
    path = preset(Path(path), "cluster" if "gpus_per_node" in root.model_fields else "run")
    origins: Origins = {}
    values = _read_with_includes(path, origins)
    problems = _apply_overrides(root, values, overrides, origins)
    try:
        config = root.model_validate(as_meant(values, root))
    except ValidationError as error:
        problems += describe(error, origins, default_origin=str(path), root=root)
        config = None
    if problems or config is None:
        raise ConfigError(_listing(problems))
    return config, origins


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, keys in schema order; `load_run_config` reads it
    back to an equal RunConfig."""
    text: str = yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )
    return text


def completed(values: Mapping[str, Any], section: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """Return a mapping that `dump_config` wrote, perhaps in an earlier version, with missing keys
    at their present defaults; nothing is checked.

    A required value that is missing stays missing, and a key that `section` does not know is kept.
    """
    found = dict(values)
    for name, field in section.model_fields.items():
        below = field.annotation
        value = found.get(name)
        if name not in found and not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif (
            isinstance(value, Mapping) and isinstance(below, type) and issubclass(below, BaseModel)
        ):
            found[name] = completed(value, below)
    return found


def default_settings() -> dict[str, Any]:
    """Return all settings that have a default, nested as in a run configuration, as `dump_config`
    writes them."""
    sections: dict[str, Any] = {
        name: {}
        for name, field in RunConfig.model_fields.items()
        if field.is_required()
        and isinstance(field.annotation, type)
        and issubclass(field.annotation, BaseModel)
    }
    return completed(sections)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in one YAML file, with values typed by YAML's rules; ConfigError when it
    is missing, not YAML, not a mapping, or too large."""
    found: dict[str, Any] = value_of(_read(path))
    return found


def read_stored(path: Path) -> dict[str, Any]:
    """Return the mapping in a file that `dump_config` wrote, perhaps in another version, with
    values typed by the settings; nothing is checked."""
    found: dict[str, Any] = as_meant(_read(path), RunConfig)
    return value_of(found)


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping in one YAML file, as it is written."""
    if not os.path.lexists(path):
        raise ConfigError(f"{shown(path)}: no such configuration file")
    values = yaml_text.read_yaml(YAML, path)
    if isinstance(values, dict):
        return values
    values = value_of(values)
    if values is not None:
        raise ConfigError(
            f"{path}: expected keys and values at the top, got {type(values).__name__}"
        )
    return {}


def _read_with_includes(path: Path, origins: Origins) -> dict[str, Any]:
    own = dict(_read(path))
    includes = own.pop("include", [])
    names = value_of(includes) if isinstance(includes, list) else [value_of(includes)]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{path}: include: expected a list of file names, got {shown(repr(value_of(includes)))}"
        )
    merged: dict[str, Any] = {}
    for name in names:
        try:
            beside = path.parent / expanded(name)
            included = beside if beside.exists() else _bundled_include(expanded(name), beside)
        except ValueError as error:
            raise ConfigError(f"{path}: include: {error}") from None
        values = _read(included)
        if "include" in values:
            raise ConfigError(
                f"{included}: include: an included file may not include others (one level only); "
                f"move it to {path}"
            )
        _merge(merged, values, os.path.normpath(included), origins)
    _merge(merged, own, str(path), origins)
    return merged


def _bundled_include(name: Path, beside: Path) -> Path:
    """Return a bundled file that an include names from the current folder; `beside` where there is
    none."""
    found = bundled(name)
    return found if found.exists() else beside


def _merge(
    target: dict[str, Any],
    values: Mapping[Any, Any],
    origin: str,
    origins: Origins,
    prefix: tuple[str, ...] = (),
) -> None:
    for key, value in values.items():
        place = (*prefix, str(key))
        if place in _LISTS and isinstance(value, list):
            value = {_LISTS[place]: value}
        if isinstance(value, Mapping):
            below = target.get(str(key))
            section = below if isinstance(below, dict) else {}
            target[str(key)] = section
            origins[place] = origin
            _merge(section, value, origin, origins, place)
        else:
            target[str(key)] = value
            origins[place] = origin


def _apply_overrides(
    root: type[BaseModel], values: dict[str, Any], overrides: Sequence[str], origins: Origins
) -> list[str]:
    """Set each KEY=VALUE in place; returns a problem for each word that could not be understood."""
    problems = []
    for word in overrides:
        key, equals, text = word.partition("=")
        key = key.strip().removeprefix("--")
        parts = SUGAR.get(key, key).split(".")
        if not equals or not all(parts):
            problems.append(f"{CLI}: {shown(repr(word))}: expected key.sub=value")
            continue
        dotted = ".".join(parts)
        annotation = functools.reduce(member, parts, root)
        try:
            value = from_word(text, annotation, f"{CLI}: {dotted}")
        except ConfigError as error:
            problems.append(str(error))
            continue
        except ValueError as error:
            problems.append(f"{CLI}: {dotted}: {error}")
            continue
        if dotted in LIST_KEYS and not isinstance(value, list):
            value = [] if value_of(value) is None else [value]
        nested: dict[str, Any] = {parts[-1]: value}
        for part in reversed(parts[:-1]):
            nested = {part: nested}
        _merge(values, nested, CLI, origins)
    return problems


def _listing(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    count = len(problems)
    if count > _MOST_PROBLEMS:
        problems = [*problems[:_MOST_PROBLEMS], f"and {count - _MOST_PROBLEMS} more"]
    return f"{count} problems in the configuration\n" + "\n".join(
        f"  {problem}" for problem in problems
    )


def _resolve_bundled(config: RunConfig) -> RunConfig:
    data = config.data
    train = tuple(map(_bundled_source, data.train))
    heldout = None if data.heldout is None else _bundled_source(data.heldout)
    found = data.model_copy(update={"train": train, "heldout": heldout})
    return config.model_copy(update={"teacher": bundled(config.teacher), "data": found})


def _bundled_source(source: Path | SourceConfig) -> Path | SourceConfig:
    if isinstance(source, SourceConfig):
        return source.model_copy(update={"path": bundled(source.path)})
    return bundled(source)


def load_model_config(path: Path | str) -> ModelConfig:
    """Return one model's shape from a YAML file such as configs/model/hypenet_2b.yaml; ConfigError
    lists everything wrong."""
    path = preset(Path(path), "model")
    try:
        return ModelConfig.model_validate(as_meant(_read(path), ModelConfig))
    except ValidationError as error:
        raise ConfigError(
            _listing(describe(error, {}, default_origin=str(path), root=ModelConfig))
        ) from error
