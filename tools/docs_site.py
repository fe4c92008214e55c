"""Hook of mkdocs: the site is made of the repository's own pages, each under its path in the
repository, so that one relative link works on the site and in a view of the repository.

mkdocs by itself takes pages from one folder, and that folder may not be the one of `mkdocs.yml`.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# pages, figures on pages, and files that pages link to
PATTERNS = (
    "*.md",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/site.css",
    "configs/**/*.yaml",
    "examples/*.md",
    "examples/*.py",
    "tests/README.md",
    "tools/bench/results/*",
)


def repository_files(root: Path) -> list[str]:
    """Return the paths of the site's files, relative to the repository `root`, sorted."""
    found = {path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(root).as_posix() for path in found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's files in the place of those of `docs_dir`; mkdocs calls this with them
    and those of the theme."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    own = [
        File(path, str(root), config.site_dir, config.use_directory_urls)
        for path in repository_files(root)
    ]
    return Files([*own, *theme])
