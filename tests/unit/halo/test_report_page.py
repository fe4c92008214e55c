"""The page of a report: complete in itself, safe with foreign text; it says what is missing."""

import base64
import re
from html.parser import HTMLParser

import pytest

from megatron_hypenet.halo.report_data import run_data
from megatron_hypenet.halo.report_page import file_name, write_page
from tests.unit.halo.test_report import ROWS
from tests.unit.halo.test_report_data import NEW_ROWS, write_run

FOREIGN = '<script>alert("x")</script> & co'


class Page(HTMLParser):
    """Text, tags and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data):
        self.words.append(data.strip())

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write the pages of one run and of two, whose names and settings are foreign text."""
    root = tmp_path_factory.mktemp("runs")
    first = run_data(*write_run(root / "a", teacher=FOREIGN), f"$a_1$ {FOREIGN}")
    better = [{**row, "recall": {"1": 5.0, "2": 4.0}} for row in NEW_ROWS]
    second = run_data(*write_run(root / "b", better, seed=7), "_b")
    old = run_data(*write_run(root / "c", ROWS, old=True), "c")
    found = {}
    for name, runs in (("one", [first]), ("two", [first, second]), ("old", [old])):
        write_page(runs, root / f"{name}.html", root / f"{name}.png")
        assert (root / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        found[name] = (root / f"{name}.html").read_text()
    return found


def test_a_page_needs_no_network_and_runs_no_script(pages):
    for text in pages.values():
        page = Page(text)
        assert page.addresses and "script" not in page.tags and "link" not in page.tags
        assert all(one.startswith("data:image/svg+xml;base64,") for one in page.addresses)
        assert "url(" not in text and "@import" not in text
        for one in page.addresses:
            picture = base64.b64decode(one.partition(",")[2]).decode()
            assert picture.count("<svg") == 1 and "http-equiv" not in picture


def test_foreign_text_is_shown_and_not_obeyed(pages):
    assert "<script" not in pages["one"] and "&lt;script&gt;" in pages["one"]
    assert FOREIGN in Page(pages["one"]).text


def test_one_run_is_reported_in_full(pages):
    text = Page(pages["one"]).text
    for title in (
        "Recall by context length",
        "Loss on held-out text by context length",
        "Curves of the stages",
        "What the student could do meanwhile",
        "Importance of the layers",
        "Speed, memory, time",
        "Model, data, software",
    ):
        assert title in text
    assert "97.0 (79.2 to 99.6)" in text and "3.2500 (3.0540 to 3.4460)" in text
    assert "Wilson" in text and "standard errors" in text, "what the bars are"
    assert "5,000" in text and "20" in text and "Settings that differ" not in text
    assert len(Page(pages["one"]).addresses) == 5


def test_two_runs_are_compared(pages):
    text = Page(pages["two"]).text
    assert "recall in % at 16 tokens 97.0 (79.2 to 99.6) 5.0 (0.9 to 23.6) -92.0 apart" in text
    assert "held-out loss at 16 tokens" in text and "+0.0000 overlap" in text
    assert "seed 1234 7" in text and "output_dir" not in text
    assert "_b: student" in text and "_b: teacher" in text


def test_an_old_run_is_reported_with_what_is_missing(pages):
    text = Page(pages["old"]).text
    assert "Missing:" in text and "no curve of the loss of stage align" in text
    assert "97.0" in text and "not known" in text and "Importance" not in text
    assert len(Page(pages["old"]).addresses) == 2


def test_labels_become_names_of_files():
    assert file_name("runs/a b") == "runs_a_b" and file_name("..") == "run"
