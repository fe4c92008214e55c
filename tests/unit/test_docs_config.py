import importlib.util

import pytest


@pytest.fixture(scope="module")
def docs_config(repo_root):
    spec = importlib.util.spec_from_file_location(
        "docs_config", repo_root / "tools" / "docs_config.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(docs_config):
    assert docs_config.main(["--check"]) == 0, "run python tools/docs_config.py"


def test_check_notices_an_old_page(docs_config, tmp_path, monkeypatch):
    monkeypatch.setattr(docs_config, "PAGE", tmp_path / "config.md")
    assert docs_config.main(["--check"]) == 1
    assert docs_config.main([]) == 0
    assert docs_config.main(["--check"]) == 0
    (tmp_path / "config.md").write_text("old")
    assert docs_config.main(["--check"]) == 1


def test_rows_read_like_yaml(docs_config):
    page = docs_config.page()
    assert "| `train_iters` | integer | **required** | Optimizer steps. |" in page
    assert "| `adam_betas` | list of number | `[0.9, 0.95]` |" in page
    assert "| `heldout` | path or source or null | `null` |" in page
    assert "| `sequence_parallel` | true or false | `false` |" in page
    assert "The keys of [`distill`](#distill), and:" in page
