"""Pages show what the command says: every `hypenet plan` of a page gives the lines below it, and
every run that a page starts can start."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_hypenet.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]


def runs_on(page: str) -> list[list[str]]:
    """Return the words of each indented `hypenet run` of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    hypenet (run .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def docs_plans():
    spec = importlib.util.spec_from_file_location("docs_plans", ROOT / "tools/docs_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_layout(monkeypatch):
    """Leave out the search for other layouts, which takes seconds: no page shows its lines."""
    monkeypatch.setattr("megatron_hypenet.planning.layout_search.fits", lambda *_: [])
    monkeypatch.chdir(ROOT)


def test_plans_say_what_the_pages_say(docs_plans, one_layout):
    found = sum(len(docs_plans.BLOCK.findall((ROOT / page).read_text())) for page in PAGES)
    assert found > 10
    assert docs_plans.main(["--check"]) == 0, "run python tools/docs_plans.py"


def test_a_number_that_has_changed_is_noticed_and_written(docs_plans, one_layout, tmp_path):
    command = "hypenet plan demo \\\n          --world-size 1"
    page = f"Text.\n\n    $ {command}\n    align  0.1  0.1\n    whole run  7.00  7.0\n\nMore.\n"
    path = tmp_path / "page.md"
    path.write_text(page)
    docs_plans.PAGES, docs_plans.ROOT, kept = tmp_path, ROOT, docs_plans.PAGES
    try:
        assert docs_plans.main(["--check"]) == 1 and path.read_text() == page
        assert docs_plans.main([]) == 0
        assert docs_plans.main(["--check"]) == 0
    finally:
        docs_plans.PAGES = kept
    now = path.read_text()
    assert now.startswith(f"Text.\n\n    $ {command}\n    align  ") and "7.00" not in now
    with pytest.raises(ValueError, match="does not say\n +aline"):
        docs_plans.renewed(page.replace("align  0.1", "aline  0.1"))


def test_the_table_of_recipes_is_what_plans_say(one_layout, capsys):
    page = (ROOT / "docs/recipes/README.md").read_text(encoding="utf-8")
    row = r"^\| \[`distill_(\w+)`\]\S* \|.*\| (\d)[^|]* \| ([\d.]+) \| (\d+) GiB \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert [size for size, *_ in rows] == ["06b", "2b", "5b", "9b"]
    for size, gpus, gpu_hours, disk in rows:
        words = [f"distill_{size}", "--model", f"configs/model/hypenet_{size}.yaml"]
        run(["plan", *words, "--world-size", gpus, "teacher=T", "data=D", "--json"])
        said = json.loads(capsys.readouterr().out)
        whole = sum(step["gpu_hours"] for step in said["hours"].values())
        assert (f"{whole:.1f}", f"{said['disk']['peak'] / 2**30:.0f}") == (gpu_hours, disk), size


@pytest.mark.parametrize("name", [name for name in PAGES if runs_on(name)])
def test_a_run_on_a_page_can_start(name, capsys, monkeypatch, tmp_path):
    """With the bundled teacher and text in the place of those that are named, or that tools make
    below build/, where a step checks everything and begins nothing."""
    monkeypatch.chdir(tmp_path)
    bundled = ROOT / "assets" / "tiny-qwen3"
    ours = {"teacher": f"teacher={bundled}", "data": f"data={bundled / 'sample.txt'}"}
    for words in runs_on(name):
        own = [ours.get(word.partition("=")[0], word) for word in words if word != "..."]
        own += ours.values() if "..." in words else ()
        if "configs/run/smollm2_135m.yaml" in words:
            own += [*ours.values(), "data.heldout=null"]
        assert run([*own, "--dry-run"]) == 0, f"{words}: {capsys.readouterr().err}"
    assert not any(tmp_path.iterdir())
