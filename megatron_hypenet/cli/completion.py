"""What a shell proposes behind `hypenet`: verbs, options, presets, stages, steps and settings.

`hypenet --install-completion` and `--show-completion` are Typer's, for bash, zsh and fish. Typer
asks one application for everything, so that the verbs stand behind one group here, each imported
when its turn comes; the command itself does not go this way. No proposal loads torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer
from typer.core import TyperGroup


def run(words: list[str], verbs: Mapping[str, str]) -> int:
    """Install or show the completion of `verbs` (name -> one line of help), or answer the shell
    that asks; returns the exit code."""
    command = typer.main.get_command(_root(verbs))
    try:
        result = command.main(args=words, prog_name="hypenet", standalone_mode=False)
    except SystemExit as done:  # Typer leaves as soon as it has answered
        result = done.code
    return result if isinstance(result, int) else 0


def presets(kind: str = "") -> Callable[[str], list[str]]:
    """Return the proposals for a configuration: the presets of `kind`, or all; the shell proposes
    files where none fits."""

    def proposals(incomplete: str) -> list[str]:
        from megatron_hypenet.config import bundled

        names = (path.stem for of, path in bundled.presets() if kind in ("", of))
        return _fitting(names, incomplete)

    return proposals


def stages(incomplete: str) -> list[str]:
    """Propose training stages."""
    from megatron_hypenet.config.schema import STAGES

    return _fitting(STAGES, incomplete)


def steps(incomplete: str) -> list[str]:
    """Propose the steps of a run."""
    from megatron_hypenet.config.loader import load_run_config
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.tasks import halo_steps

    run = load_run_config("demo")  # every run has the same
    return _fitting((step.name for step in halo_steps(run, RunFolder(run.output_dir))), incomplete)


def settings(incomplete: str) -> list[str]:
    """Propose the settings of a run, as KEY=; sections first, so that the list stays short."""
    from megatron_hypenet.config.schema import RunConfig

    above, dot, _ = incomplete.rpartition(".")
    fields: Any = RunConfig.model_fields
    for name in above.split(".") if dot else ():
        fields = getattr(getattr(fields.get(name), "annotation", None), "model_fields", {})
    names = (
        f"{above}{dot}{name}{'.' if hasattr(field.annotation, 'model_fields') else '='}"
        for name, field in fields.items()
    )
    return _fitting(names, incomplete)


def _fitting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _root(verbs: Mapping[str, str]) -> typer.Typer:
    class Verbs(TyperGroup):
        """All verbs, each imported when it is looked at."""

        def list_commands(self, ctx: Any) -> list[str]:
            """Return the verbs in pipeline order."""
            return list(verbs)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            """Return the verb's own command; None for a word that is no verb."""
            if cmd_name not in verbs:
                return None
            module = importlib.import_module(f"megatron_hypenet.cli.{cmd_name}")
            command = typer.main.get_command(module.app)
            command.help = verbs[cmd_name]
            return command

    app = typer.Typer(cls=Verbs, rich_markup_mode=None)

    @app.callback()
    def root() -> None:
        """Distil a softmax-attention teacher into a HypeNet."""

    return app
