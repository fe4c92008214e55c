"""All mixers by their names in `mixer_types`.

transformers copies only files that are imported by name, so in an exported folder the mixers of its
model are named where this file is imported here."""

from importlib import import_module
from pathlib import Path

from .layers_hypenet import by_name

MIXERS = by_name(
    *(
        import_module(f".{file.stem}", __package__).MIXER
        for file in sorted(Path(__file__).parent.glob("mixer_*.py"))
    )
)
