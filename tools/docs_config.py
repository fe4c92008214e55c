"""Writes docs/config.md from the descriptions in the configuration schema: `python
tools/docs_config.py [--check]`."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.problems import section_type
from megatron_hypenet.config.rope import Llama3Scaling, YarnScaling
from megatron_hypenet.config.schema import DataConfig, RunConfig, SourceConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

INTRO = """# Configuration

Generated from `megatron_hypenet/config/` by `python tools/docs_config.py`; a test fails when it is
out of date. `hypenet config schema` prints the same as JSON schema.

A run is one YAML file plus `key.sub=value` words on the command line:

    hypenet run configs/run/quickstart.yaml teacher=/models/Qwen3-0.6B data=corpus.txt align.lr=3e-4

- Later wins: defaults below < files in `include:` (one level, left to right, relative to the file)
  < the file < the command line.
- Sections merge key by key; lists and plain values replace what was there.
- Unknown keys, wrong types and missing keys are errors, all listed at once. Keys without a default
  must be set.
- `data=PATH` is short for `data.train=PATH`; `--tp N`, `--pp N`, `--cp N` stand for the sizes under
  `parallel`.
- Relative paths start at the current directory; `assets/...` is also found in the repository.
- Values are YAML, and the type of the setting decides what they mean: `3e-4` and `.5` are numbers
  for a number, `yes` is true for a switch, and `12.10`, `0755` or `1:30` stay as they are written
  for a text. What YAML 1.1 would turn into another number (`0755`, `1:30`) is refused for a number.
  `<<: *name` takes over a section with an anchor; what is written beside it wins.
- On the command line, a path or text is all that follows the first `=`, with `#`, `:`, `*` or
  spaces inside of it; only lists and sections (`[1, 2]`, `{lr: 1e-3}`) are read as YAML. An empty
  value is refused; write `null` for none.
- `~`, `~user`, `$NAME` and `${NAME}` in paths are replaced, in files and on the command line; an
  unknown user or variable is an error.

The stages `align`, `distill` and `finetune` share most keys. `configs/stage/` has them at the scale
of the paper.
"""

SOURCE = """A source is a path, or a path with settings: `{path: chats.jsonl, weight: 0.2,
messages_key: messages}`."""


_BY_NAME: dict[Any, str] = {
    SourceConfig: "source",
    Llama3Scaling: "`rope_type: llama3`",
    YarnScaling: "`rope_type: yarn`",
}
"""Values that are sections of their own."""


def type_name(annotation: Any) -> str:
    """Write the annotation as a reader would say it: `int`, `path or null`, `cosine or
    constant`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in args)
    if origin is tuple:
        inner = {type_name(part) for part in args if part is not Ellipsis}
        return f"list of {' or '.join(sorted(inner))}"
    if annotation is type(None):
        return "null"
    if annotation in _BY_NAME:
        return _BY_NAME[annotation]
    return {
        "str": "text",
        "Path": "path",
        "float": "number",
        "int": "integer",
        "bool": "true or false",
    }.get(getattr(annotation, "__name__", ""), str(annotation))


def default_text(field: FieldInfo) -> str:
    """Return the default in YAML spelling, or **required**."""
    value = field.default
    if value is PydanticUndefined:
        return "**required**"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def section_table(section: type[BaseModel], leave_out: frozenset[str] = frozenset()) -> list[str]:
    """Return Markdown rows of the plain keys of one section; none where it has sections only."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name in leave_out or section_type(field.annotation) is not None:
            continue
        lines.append(
            f"| `{name}` | {type_name(field.annotation)} | {default_text(field)} | "
            f"{field.description} |"
        )
    return lines if len(lines) > 2 else []


def inner_sections(prefix: str, section: type[BaseModel]) -> list[str]:
    """Return the sections inside a section, each with its keys; where these are sections of one
    kind again, their keys once."""
    lines = []
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is None:
            continue
        lines += [f"### `{prefix}.{name}`", "", str(field.description), ""]
        kinds = {
            key: kind
            for key, part in inner.model_fields.items()
            if (kind := section_type(part.annotation)) is not None
        }
        if not kinds:
            lines += [*section_table(inner), ""]
            continue
        (kind,) = set(kinds.values())
        names = ", ".join(f"`{key}`" for key in kinds)
        lines += [f"The keys of each of {names}:", "", *section_table(kind), ""]
    return lines


def page() -> str:
    """Return the whole page."""
    lines = [INTRO, "## Top level", "", *section_table(RunConfig), ""]
    seen: dict[type[BaseModel], str] = {}
    for name, field in RunConfig.model_fields.items():
        section = section_type(field.annotation)
        if section is None:
            continue
        lines += [f"## `{name}`", "", str(field.description), ""]
        if section in seen:
            lines += [f"The keys of [`{seen[section]}`](#{seen[section]}).", ""]
            continue
        parent = next((other for other in seen if issubclass(section, other)), None)
        seen[section] = name
        if parent is not None:
            lines += [f"The keys of [`{seen[parent]}`](#{seen[parent]}), and:", ""]
            lines += [*section_table(section, frozenset(parent.model_fields)), ""]
            continue
        table = section_table(section)
        if len(table) > 2:  # not of a section that holds other sections only
            lines += [*table, ""]
        lines += inner_sections(name, section)
        if section is DataConfig:
            lines += [SOURCE, "", *section_table(SourceConfig), ""]
    lines += [
        "## Model shape",
        "",
        "`configs/model/*.yaml`, and `model.json` in every checkpoint.",
        "",
        *section_table(ModelConfig),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Write the page, or with --check only say whether it is up to date (exit 1 when it is not)."""
    text = page()
    if argv == ["--check"]:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(
            "docs/config.md is up to date"
            if current
            else "docs/config.md is out of date: run python tools/docs_config.py"
        )
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
