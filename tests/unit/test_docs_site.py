"""The documentation site builds without a warning, fetches nothing, and its pages read the same
there and in a view of the repository."""

import importlib.util
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown import Markdown
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

BLOCKS = {"ul", "ol", "li", "pre", "table", "tr", "blockquote", "h1", "h2", "h3", "h4"}


class Reader(HTMLParser):
    """What the tests ask of a page of HTML: its nested blocks, links, anchors and loaded files."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.blocks: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = {key: value or "" for key, value in attrs}
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(attributes["href"])
        if "src" in attributes:
            self.loaded.append(attributes["src"])
        if tag in BLOCKS:
            self.open.append(tag)
            self.blocks.append("/".join(self.open))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def anchors_of_a_view(page: str) -> set[str]:
    """Return the anchors that a view of the repository gives to the headings of a Markdown page."""
    found: set[str] = set()
    for match in re.finditer(r"^#+ +(.+?) *$", page, re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeated = sum(name == slug or name.startswith(f"{slug}-") for name in found)
        found.add(slug if slug not in found else f"{slug}-{repeated}")
    return found


@pytest.fixture(scope="module")
def pages(repo_root) -> list[str]:
    spec = importlib.util.spec_from_file_location("docs_site", repo_root / "tools/docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [path for path in module.repository_files(repo_root) if path.endswith(".md")]


@pytest.fixture(scope="module")
def site(repo_root, tmp_path_factory) -> Path:
    """Build the site; any warning of mkdocs (a broken link, anchor or name) raises Abort."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(repo_root / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def html_of(site: Path, page: str) -> Path:
    path = site / page.replace("README.md", "index.md")
    return path.with_suffix(".html")


def test_every_page_of_the_repository_is_built(site, pages):
    assert len(pages) > 20
    assert [page for page in pages if not html_of(site, page).is_file()] == []


def test_no_placeholder_of_a_docstring_is_taken_for_html(site):
    """`<name>` outside of backticks would be an element, and vanish."""
    for path in (site / "docs" / "api").rglob("*.html"):
        article = (
            path.read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0]
        )
        named = {tag for tag in re.findall(r"<([a-zA-Z][\w-]*)", article) if "_" in tag}
        assert named == set(), path


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = Reader(path.read_text(encoding="utf-8"))
        assert page.loaded, path
        assert [name for name in page.loaded if urlsplit(name).netloc] == [], path
        # the theme would load its library from elsewhere for a diagram
        assert 'class="mermaid"' not in path.read_text(encoding="utf-8"), path
    for path in site.rglob("*.css"):
        sources = re.findall(r"@import|url\(\s*['\"]?(?:https?:)?//", path.read_text())
        assert sources == [], path


def test_links_work_in_a_view_of_the_repository(repo_root, pages):
    broken = []
    for page in pages:
        text = (repo_root / page).read_text(encoding="utf-8")
        for link in Reader(MarkdownIt("commonmark").enable("table").render(text)).links:
            parts = urlsplit(link)
            if parts.netloc:
                continue
            target = (repo_root / page).parent / unquote(parts.path) if parts.path else None
            target = target or repo_root / page
            if not target.exists():
                broken.append(f"{page}: {link}")
            elif parts.fragment and parts.fragment not in anchors_of_a_view(
                target.read_text(encoding="utf-8")
            ):
                broken.append(f"{page}: {link} (anchor)")
    assert broken == []


def test_pages_have_the_same_blocks_on_the_site_and_in_the_repository(repo_root, pages):
    """Lists, code, tables and headings nest alike for the site's Markdown, which wants lists
    indented by four and a blank line before a table, and for CommonMark; the test compares them."""
    config = load_config(str(repo_root / "mkdocs.yml"))
    different = []
    for page in pages:
        text = (repo_root / page).read_text(encoding="utf-8")
        ours = Markdown(extensions=config.markdown_extensions, extension_configs=config.mdx_configs)
        on_site = Reader(ours.convert(text)).blocks
        in_view = Reader(MarkdownIt("commonmark").enable("table").render(text)).blocks
        if on_site != in_view:
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(on_site, in_view, strict=False))
                    if len({*pair}) > 1
                ),
                min(len(on_site), len(in_view)),
            )
            different.append(f"{page}: {on_site[at : at + 3]}, in a view {in_view[at : at + 3]}")
    assert different == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[page](docs/other.md#a-part)", None),
        ("[page](docs/gone.md)", "docs/gone.md"),
        ("[page](docs/other.md#gone)", "#gone"),
        ("[folder](docs)", "'docs'"),
    ],
)
def test_a_broken_link_ends_the_build(repo_root, tmp_path, monkeypatch, caplog, text, problem):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    shutil.copy(repo_root / "tools/docs_site.py", tmp_path / "tools/docs_site.py")
    (tmp_path / "docs/site.css").touch()
    (tmp_path / "docs/other.md").write_text("# Other\n\n## A part\n")
    (tmp_path / "README.md").write_text(f"# Home\n\n{text}\n")
    settings = (repo_root / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    nav = "\nnav: [README.md, docs/other.md]\nnot_in_nav: ''\n"
    settings = re.sub(r"\nnot_in_nav:.*\n(?: .*\n)*", "\n", settings)
    (tmp_path / "mkdocs.yml").write_text(settings + nav)
    config = load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    if problem is None:
        build(config)
    else:
        with pytest.raises(Abort):
            build(config)
        assert problem in caplog.text
