"""Pages show what the command says: every `hypenet plan` of a page gives the lines below it, and
every run that a page starts can start."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_hypenet.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: str, start: str) -> list[tuple[list[str], list[str]]]:
    """Return the words of each indented command that begins with `start`, and the lines below."""
    found = []
    for block in re.findall(r"(?:^    .*\n)+", page, re.MULTILINE):
        lines = [line[4:] for line in block.replace("\\\n    ", " ").splitlines()]
        for at, line in enumerate(lines):
            if line.startswith(start):
                words = shlex.split(line[line.index("hypenet ") :], comments=True)[1:]
                found.append((words, lines[at + 1 :]))
    return found


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PLANS = [
    pytest.param(words, shown, id=f"{name}-{number}")
    for name in PAGES
    for number, (words, shown) in enumerate(commands(text(name), "$ hypenet plan"))
]


def test_pages_show_plans():
    assert len(PLANS) > 10


@pytest.mark.parametrize(("words", "shown"), PLANS)
def test_a_plan_says_what_its_page_says(words, shown, capsys, monkeypatch):
    """The search for other layouts, which takes seconds, is left out: no page shows its lines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron_hypenet.planning.layout_search.fits", lambda *_: [])
    run(words)
    said = capsys.readouterr().out.splitlines()
    assert shown
    assert [line for line in shown if line not in said] == []


@pytest.mark.parametrize("name", [name for name in PAGES if commands(text(name), "hypenet run")])
def test_a_run_on_a_page_can_start(name, capsys, monkeypatch, tmp_path):
    """With the bundled teacher and text in the place of those that are named, where a step checks
    everything and begins nothing."""
    monkeypatch.chdir(tmp_path)
    bundled = ROOT / "assets" / "tiny-qwen3"
    ours = {"teacher": f"teacher={bundled}", "data": f"data={bundled / 'sample.txt'}"}
    for words, _ in commands(text(name), "hypenet run"):
        own = [ours.get(word.partition("=")[0], word) for word in words]
        assert run([*own, "--dry-run"]) == 0, f"{words}: {capsys.readouterr().err}"
    assert not any(tmp_path.iterdir())


def test_a_number_that_has_changed_is_noticed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron_hypenet.planning.layout_search.fits", lambda *_: [])
    ((words, shown),) = commands(
        "    $ hypenet plan demo \\\n          --world-size 1\n    align    1 x 2\n",
        "$ hypenet plan",
    )
    assert words == ["plan", "demo", "--world-size", "1"] and shown == ["align    1 x 2"]
    run(words)
    assert shown[0] not in capsys.readouterr().out.splitlines()
