"""Paths in settings and options: `~`, `~user`, `$NAME` and `${NAME}` are expanded as in a shell, or
refused by name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

_REFERENCE = re.compile(r"\$(?:\{([^}]*)\}?|([A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def expanded(path: Path | str) -> Path:
    """Return `path` with a leading `~` or `~user` and all `$NAME` and `${NAME}` replaced.

    Raises ValueError that names the user or the variable that does not exist, and for text that is
    no path: empty, or with line breaks or other characters that cannot be printed. Expanding the
    result again changes nothing, so a stored path stays the same.
    """
    text = path if isinstance(path, str) else str(path)
    if not text.strip():
        raise ValueError("the path is empty; '.' is the current folder")
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError(f"the path {text!r} holds a control character, such as a line break")
    found = _with_home(_REFERENCE.sub(lambda match: _variable(text, match), text))
    if _REFERENCE.search(found):
        raise ValueError(
            f"the path {text!r} leads to {found!r}, in which variables stand again; "
            "write it without variables"
        )
    result = Path(found)
    # ./~x: Path drops the ./, and the result would be read as a home folder
    if result.parts and result.parts[0].startswith("~"):
        raise ValueError(
            f"the path {text!r} is a name that begins with ~; write it from /, "
            "or choose another name"
        )
    return result


def download_hint(path: Path | str, *, what: str = "model") -> str:
    """Return, as the end of a sentence, how to get what `path` names where it does not exist and
    reads like a name on the Hugging Face hub (`Qwen/Qwen3-0.6B`); empty for any other path.

    `what` is "model" or "dataset".
    """
    text = str(path)
    if not _HUB_NAME.fullmatch(text) or Path(text).exists() or Path(text).parent.exists():
        return ""
    folder = Path(text).name
    kind = "" if what == "model" else f" --repo-type {what}"
    return (
        f". If the {what} of that name on the Hugging Face hub is meant, which is not fetched by "
        f"itself: `hf download {text}{kind} --local-dir {folder}`, then name {folder}"
    )


def _variable(text: str, match: re.Match[str]) -> str:
    name = match.group(1) if match.group(2) is None else match.group(2)
    if not _NAME.fullmatch(name) or (match.group(2) is None and not match.group().endswith("}")):
        raise ValueError(
            f"the path {text!r} has {match.group()!r}, which is no variable; "
            f"write $NAME or ${{NAME}}"
        )
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(
            f"the path {text!r} names the variable {name}, "
            f"which is {'empty' if name in os.environ else 'not set'}"
        )
    return value


def _with_home(text: str) -> str:
    """Replace a leading `~` or `~user`."""
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found.startswith("~"):
        who = text.split("/")[0]
        raise ValueError(f"the path {text!r} begins with {who}, and there is no such user")
    return found


def _as_setting(value: Any) -> Any:
    return expanded(value) if isinstance(value, str | Path) else value


PathSetting = Annotated[Path, BeforeValidator(_as_setting)]
"""A path among the settings."""
