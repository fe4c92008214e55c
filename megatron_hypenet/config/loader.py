"""YAML files and command-line overrides -> RunConfig, with every problem listed at once.

Precedence, later wins: defaults of the schema < files named by `include:` (left to right) < the file itself < KEY=VALUE overrides.
Sections merge key by key; any other value replaces what was there. Relative paths are taken from the current directory; a path that
starts with `assets/` and is not found there is taken from the repository that holds this package (the bundled teacher and sample).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.problems import Origins, describe
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.errors import ConfigError

Kind = TypeVar("Kind", bound=BaseModel)

CLI = "CLI"
REPO_ROOT = Path(__file__).resolve().parents[2]
BUNDLED = "assets"

# `data=corpus.txt` on the command line means the training files; the other keys of the section keep their long names.
SUGAR = {"data": "data.train"}
LIST_KEYS = frozenset({"data.train"})


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as the float it looks like (YAML 1.1 reads text) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(rows) for key, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+.0123456789":
    # in front of YAML 1.1's own float rule: an exponent needs neither a dot nor a sign
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(
        0, ("tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"))
    )


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, its includes and `overrides` (`key.sub=value`); ConfigError lists everything wrong, each with its origin."""
    return load_with_origins(path, overrides)[0]


def load_with_origins(path: Path | str, overrides: Sequence[str] = ()) -> tuple[RunConfig, Origins]:
    """As `load_run_config`, with the file or CLI that set each key; keys that are not in it have their default."""
    config, origins = load_as(RunConfig, path, overrides)
    return _resolve_bundled(config), origins


def load_as(root: type[Kind], path: Path | str, overrides: Sequence[str] = ()) -> tuple[Kind, Origins]:
    """A configuration of class `root` by the rules above, and where each key was set; ConfigError lists everything wrong."""
    path = Path(path)
    origins: Origins = {}
    values = _read_with_includes(path, origins)
    problems = _apply_overrides(values, overrides, origins)
    try:
        config = root.model_validate(values)
    except ValidationError as error:
        problems += describe(error, origins, default_origin=str(path), root=root)
        config = None
    if problems or config is None:
        raise ConfigError(_listing(problems))
    return config, origins


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, keys in schema order; `load_run_config` reads it back to an equal RunConfig."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def completed(values: Mapping[str, Any], section: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """What `dump_config` wrote, perhaps in an earlier version, with what it lacks at the default that it would get now; nothing is checked.

    A required value that is missing stays missing, and a key that `section` does not know is kept.
    """
    found = dict(values)
    for name, field in section.model_fields.items():
        below, value = field.annotation, found.get(name)
        if name not in found and not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif isinstance(value, Mapping) and isinstance(below, type) and issubclass(below, BaseModel):
            found[name] = completed(value, below)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file; ConfigError when it is missing, not UTF-8, not YAML, or not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {type(values).__name__}")
    return values


def _read_with_includes(path: Path, origins: Origins) -> dict[str, Any]:
    own = read_yaml(path)
    includes = own.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include: expected a list of file names, got {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        included = path.parent / name
        values = read_yaml(included)
        if "include" in values:
            raise ConfigError(f"{included}: include: an included file may not include others (one level only); move it to {path}")
        _merge(merged, values, os.path.normpath(included), origins)
    _merge(merged, own, str(path), origins)
    return merged


def _merge(target: dict[str, Any], values: Mapping[Any, Any], origin: str, origins: Origins, prefix: tuple[str, ...] = ()) -> None:
    for key, value in values.items():
        place = (*prefix, str(key))
        if isinstance(value, Mapping):
            below = target.get(str(key))
            section = below if isinstance(below, dict) else {}
            target[str(key)] = section
            origins[place] = origin
            _merge(section, value, origin, origins, place)
        else:
            target[str(key)] = value
            origins[place] = origin


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], origins: Origins) -> list[str]:
    """Set each KEY=VALUE in place; returns the words that could not be understood."""
    problems = []
    for word in overrides:
        key, equals, text = word.partition("=")
        key = key.strip().removeprefix("--")
        parts = SUGAR.get(key, key).split(".")
        if not equals or not all(parts):
            problems.append(f"{CLI}: {word!r}: expected key.sub=value")
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            problems.append(f"{CLI}: {word!r}: the value is not valid YAML: {str(error).splitlines()[0]}")
            continue
        dotted = ".".join(parts)
        if dotted in LIST_KEYS and not isinstance(value, list):
            value = [] if value is None else [value]
        nested: dict[str, Any] = {parts[-1]: value}
        for part in reversed(parts[:-1]):
            nested = {part: nested}
        _merge(values, nested, CLI, origins)
    return problems


def _listing(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration\n" + "\n".join(f"  {problem}" for problem in problems)


def _resolve_bundled(config: RunConfig) -> RunConfig:
    data = config.data
    train = tuple(map(bundled_path, data.train))
    heldout = None if data.heldout is None else bundled_path(data.heldout)
    found = data.model_copy(update={"train": train, "heldout": heldout})
    return config.model_copy(update={"teacher": bundled_path(config.teacher), "data": found})


def bundled_path(path: Path) -> Path:
    """`path`, or its twin in the repository when it starts with assets/ and is not in the current directory."""
    path = path.expanduser()
    inside = not path.is_absolute() and path.parts[:1] == (BUNDLED,)
    if inside and not path.exists() and (REPO_ROOT / path).exists():
        return REPO_ROOT / path
    return path


def load_model_config(path: Path | str) -> ModelConfig:
    """One model's shape from a YAML file such as configs/model/hypenet_2b.yaml; ConfigError lists everything wrong."""
    path = Path(path)
    try:
        return ModelConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(_listing(describe(error, {}, default_origin=str(path), root=ModelConfig))) from error
