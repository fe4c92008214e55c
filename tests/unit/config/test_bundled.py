"""Bundled files are found by name, from a repository and from an installed package."""

from pathlib import Path

import pytest

from megatron_hypenet.config import bundled as module
from megatron_hypenet.config.bundled import KINDS, SHARE, bundle, bundled, preset, presets


@pytest.fixture
def forget():
    """Look for the bundle anew, before and after."""
    bundle.cache_clear()
    yield
    bundle.cache_clear()


def test_in_a_repository_it_is_the_repository(repo_root, forget):
    assert bundle() == repo_root


def test_of_an_installed_package_it_lies_under_share(tmp_path, monkeypatch, forget):
    (tmp_path / SHARE / "configs" / "run").mkdir(parents=True)
    monkeypatch.setattr(module, "REPO_ROOT", tmp_path / "site-packages")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert bundle() == tmp_path / SHARE


def test_what_begins_with_a_bundled_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundled(Path("configs/run/demo.yaml")) == bundle() / "configs/run/demo.yaml"
    for path in (Path("configs/none"), Path("mine/demo.yaml"), tmp_path / "configs/run/demo.yaml"):
        assert bundled(path) == path
    (tmp_path / "configs" / "run").mkdir(parents=True)
    (tmp_path / "configs" / "run" / "demo.yaml").touch()
    assert bundled(Path("configs/run/demo.yaml")) == Path("configs/run/demo.yaml")


def test_names_of_presets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preset(Path("demo"), "run") == bundle() / "configs/run/demo.yaml"
    assert preset(Path("demo.yaml"), "run") == bundle() / "configs/run/demo.yaml"
    assert preset(Path("demo"), "cluster") == Path("demo")
    assert {kind for kind, _ in presets()} == set(KINDS)
