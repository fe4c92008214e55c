"""Examples in help texts, each on one line of its own, so that it can be copied into a shell.

Not a verb: `cli/main.py` does this for every verb. A docstring breaks an example where it is too
long for a line of code; the command line library would break it anew for the width of the terminal.
"""

from __future__ import annotations

import inspect
import re

import typer

COMMAND = "hypenet "
"""What the paragraph of an example begins with."""

# the library leaves a paragraph alone that begins with a line of this character
_AS_IT_IS = "\b"


def keep_whole(app: typer.Typer) -> None:
    """Let the help of every command of `app` show each example on one line."""
    for info in app.registered_commands:
        info.help = whole(info.help or inspect.getdoc(info.callback) or "")
    for name in ("help", "epilog"):
        text = getattr(app.info, name)
        if isinstance(text, str):
            setattr(app.info, name, whole(text))


def whole(text: str) -> str:
    """Return a help text with every paragraph that is an example joined into one line, which is
    marked to be left alone; a text that was treated before stays as it is."""
    return "\n\n".join(
        f"{_AS_IT_IS}\n  {' '.join(part.split())}" if part.lstrip().startswith(COMMAND) else part
        for part in re.split(r"\n\s*\n", text)
    )
