"""Notebooks: they run from a clean kernel, and show what is kept of them."""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from places import ROOT
from printed import near, numbers, text_of, words
from processes import finished

from fedgfe_store.cli.main import _COMMANDS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_IMAGE_BYTES = 150_000


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell) -> list[tuple[list[str], str]]:
    """Return what a cell shows: its kinds, and its text."""
    printed = "".join(each.text for each in cell.outputs if each.output_type == "stream")
    found = [(["printed"], printed)] if printed else []
    for each in cell.outputs:
        if "data" in each:
            page = each.data.get("text/html", "")
            plain = each.data.get("text/plain", "").partition(" object at ")[0]
            # Tables of pandas are as wide as their numbers, and broken where they are too wide.
            text = text_of(page) if "<table" in page else plain
            found.append((sorted(each.data), text))
    return found


def test_there_are_notebooks():
    assert [file.name[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


# One stands for the others where there is little time.
RUN = [
    pytest.param(file, marks=[] if file.name[:2] == "01" else pytest.mark.long)
    for file in NOTEBOOKS
]


@pytest.mark.parametrize("file", RUN, ids=lambda file: file.stem)
def test_it_runs_and_shows_what_is_kept(file, demo, tmp_path):
    copy = shutil.copy(file, tmp_path)
    before = sorted(demo.folder.rglob("*"))
    command = [sys.executable, ROOT / "tools" / "run_notebooks.py", copy, "--demo", demo.folder]
    done = finished(command, check=False)
    assert done.returncode == 0, done.stderr
    kept, fresh = (code_cells(nbformat.read(path, as_version=4)) for path in (file, copy))
    assert [cell.source for cell in kept] == [cell.source for cell in fresh]
    assert [cell.execution_count for cell in kept] == list(range(1, len(kept) + 1))
    for old, new in zip(kept, fresh, strict=True):
        for (kinds, expected), (fresh_kinds, text) in zip(shown(old), shown(new), strict=True):
            assert fresh_kinds == kinds, old.source
            assert words(text) == words(expected), old.source
            assert numbers(text) == near(expected), old.source
        printed_to = {each.name for each in new.outputs if each.output_type == "stream"}
        assert printed_to <= {"stdout"}, new.outputs
    assert sorted(demo.folder.rglob("*")) == before, "it writes elsewhere"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_kept_is_small_and_of_no_machine(file):
    notebook = nbformat.read(file, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert len(outputs) > 8
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        for kind, content in output.get("data", {"": output.get("text", "")}).items():
            if kind.startswith("image/"):
                assert len(base64.b64decode(content)) < MOST_IMAGE_BYTES
            elif "base64" not in content:
                assert not re.search(r"(?<![\w.<])/(tmp|home|root|Users|work|opt|var)\b", content)


def test_the_commands_that_they_name_are_there():
    text = "".join(file.read_text() for file in NOTEBOOKS)
    named = set(re.findall(r"fedgfe-store ([a-z]+)", text))
    assert {"generate", "import", "stats"} <= named <= set(_COMMANDS)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_its_first_cell_finds_the_demo(file, tmp_path, monkeypatch):
    first = code_cells(nbformat.read(file, as_version=4))[0].source
    monkeypatch.delenv("FEDGFE_DEMO", raising=False)
    for folder in ("notebooks", "demo/embeddings.zarr", "elsewhere/embeddings.zarr"):
        (tmp_path / folder).mkdir(parents=True)
    for start in (tmp_path / "notebooks", tmp_path, tmp_path / "demo"):
        monkeypatch.chdir(start)
        exec(first, {})
        assert Path.cwd() == tmp_path / "demo"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDGFE_DEMO", "elsewhere")
    exec(first, {})
    assert Path.cwd() == tmp_path / "elsewhere"


def test_without_a_demo_it_says_how_to_make_one(tmp_path, monkeypatch):
    first = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source
    monkeypatch.chdir(tmp_path)
    for wrong in (None, os.fspath(tmp_path / "wrong")):
        if wrong is not None:
            monkeypatch.setenv("FEDGFE_DEMO", wrong)
        with pytest.raises(FileNotFoundError, match="make demo"):
            exec(first, {})
