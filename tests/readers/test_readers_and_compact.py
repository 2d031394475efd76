"""Readers that list files while a compaction removes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import fill

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group


@pytest.fixture(params=["glob", "walk"])
def thin(store, monkeypatch, request):
    """A store that is compacted right after the first folder of tensor files has been listed."""
    for number in range(1, 5):
        fill(store, node=0, round=number)
    store.delete(round=[1, 2, 3])
    compacted: list[Any] = []

    def compact():
        if not compacted:
            compacted.append(None)
            assert EmbeddingStore.open(store.path).compact().files_freed > 5

    def glob(folder, pattern):
        found = list(real_glob(folder, pattern))
        if any(path.name == "c.0.0.0" for path in found):
            compact()
        return iter(found)

    def walk(place, *rest, **options):
        for found in real_walk(place, *rest, **options):
            if "c.0.0.0" in found[2]:
                compact()
            yield found

    real_glob, real_walk = Path.glob, os.walk
    if request.param == "glob":
        monkeypatch.setattr(Path, "glob", glob)
    else:
        monkeypatch.setattr(os, "walk", walk)
    return store.path


def test_history(thin):
    assert EmbeddingStore.open(thin).history()["added"].tolist() == [6, 6, 6, 6, 0]


def test_info(thin):
    done = CliRunner().invoke(group, ["--store", str(thin), "info"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "on disk:     " in done.output


def test_the_page_of_a_store(thin):
    assert EmbeddingStore.open(thin)._repr_html_().startswith("<")
