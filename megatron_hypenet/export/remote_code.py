"""The modelling code of an exported folder: only the files that the model's mixers need.

transformers copies the files that imports of the form `from .name import ...` name, so the registry
of mixers, which here finds the files beside it, is written out in each folder. It is written into
the files that transformers loads, because 4.57 keeps folders of the same name in one place and
reloads only those files. From a local folder 4.57 also copies only direct imports of such a file
and then misses the rest, so each of them gets an import of all files that it needs."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_hypenet.errors import ConversionError

REMOTE_CODE = Path(__file__).parent / "hf_remote"
"""Folder of all modelling code."""
ENTRIES = ("configuration_hypenet", "modeling_hypenet")
"""Modules that `auto_map` of config.json names."""
REGISTRY = "from .mixers_hypenet import MIXERS\n"
"""The line that the written registry replaces."""


def remote_files(mixers: Iterable[str]) -> dict[str, str]:
    """Return text by file name, for a model with these entries of `mixer_types` as they are
    written.

    The file of a mixer is `mixer_<entry>.py`, with underscores for hyphens. ConversionError for a
    mixer without one."""
    modules = []
    for mixer in sorted(mixers):
        modules.append(f"mixer_{mixer.replace('-', '_')}")
        if not _file(modules[-1]).is_file():
            raise ConversionError(
                f"mixer {mixer!r} has no modelling code for Hugging Face folders "
                f"(export/hf_remote/{modules[-1]}.py); export a model without it"
            )
    texts: dict[str, str] = {}
    todo = list(ENTRIES)
    while todo:
        module = todo.pop()
        if module not in texts:
            source = _file(module).read_text(encoding="utf-8")
            texts[module] = source.replace(REGISTRY, registry(modules))
            todo += siblings(texts[module])
    for entry in ENTRIES:
        texts[entry] += _indirect_imports(entry, texts)
    return {f"{module}.py": text for module, text in sorted(texts.items())}


def registry(modules: Sequence[str]) -> str:
    """Return the registry of these mixers' modules as source text."""
    imports = "".join(f"from .{name} import MIXER as {name}\n" for name in modules)
    by_name = "from .layers_hypenet import by_name\n"
    return f"{by_name}{imports}\nMIXERS = by_name({', '.join(modules)})\n\n"


def _file(module: str) -> Path:
    return REMOTE_CODE / f"{module}.py"


def siblings(source: str) -> list[str]:
    """Return the modules of the same folder that a source text imports."""
    return [
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    ]


def _indirect_imports(entry: str, texts: Mapping[str, str]) -> str:
    """Return source text that imports what the modules imported by `entry` import, and so on."""
    direct = siblings(texts[entry])
    reached: set[str] = set()
    todo = list(direct)
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += siblings(texts[module])
    lines = [f"from .{name} import __name__ as _" for name in sorted(reached - {*direct, entry})]
    note = "# transformers 4.57 copies only what this file imports"
    return "\n".join(["", note, *lines, ""]) if lines else ""
