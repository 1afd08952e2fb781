"""assets/get_smollm2.py: what it refuses, offline. What it makes is too large for a test: see the README."""

import sys

import pytest
from conftest import ROOT

from assets import get_smollm2


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_smollm2, "ROOT", tmp_path)
    monkeypatch.setattr(get_smollm2, "FOLDER", tmp_path / "model")

    def refused(call, *args):
        with pytest.raises(SystemExit) as stop:
            call(*args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return refused


def test_another_file_than_the_one_it_was_written_for_makes_nothing(refused, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"another model")
    assert "it is another file, nothing is made" in refused(get_smollm2.check, tmp_path / "model.gguf")
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(get_smollm2, "fetch", lambda folder: tmp_path / "model.gguf")
    refused(get_smollm2.main)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_model_that_is_there_is_left_alone_and_missing_packages_are_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "`uv run --group real python assets/get_smollm2.py`" in refused(get_smollm2.main)
    get_smollm2.FOLDER.mkdir()
    assert "model is there already; delete it" in refused(get_smollm2.main)


def test_the_model_is_ignored_by_git_and_no_index_is_named():
    assert "assets/smollm2-135m/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "://" not in (ROOT / "assets" / "get_smollm2.py").read_text()
