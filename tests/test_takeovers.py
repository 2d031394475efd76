"""A writer that slept is taken for dead: what it may still do, and what others do meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import fill, values

from fedgfe_store import EmbeddingStore, _claim, _commit, _recovery
from fedgfe_store._staging import Staging
from fedgfe_store.errors import ConflictError


class NoLock:
    """A lock that is granted to everyone."""

    def __init__(self, path: Path, timeout: float) -> None: ...

    def release(self) -> None: ...


class Hosts:
    """Writers of this process that take each other for those of other hosts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._names = iter("abcdefgh")
        monkeypatch.setattr(_commit, "WriterLock", NoLock)
        self.next()

    def next(self) -> None:
        """Whoever claims from now on is on another host."""
        name = next(self._names)
        self._patch.setattr(_claim, "_machine", lambda: name)

    def sleep(self, path: Path) -> None:
        """Let all who hold a claim on the store at `path` be silent for two minutes."""
        for claim in path.glob("claim.*"):
            os.utime(claim, times=(time.time() - 120,) * 2)
        self.next()


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    return Hosts(monkeypatch)


def meanwhile(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """Do `what` after files have been put in place for the first time."""
    place = Staging.place

    def placed(staging: Staging) -> None:
        place(staging)
        monkeypatch.setattr(Staging, "place", place)
        what()

    monkeypatch.setattr(Staging, "place", placed)


def check_sound(path: Path, count: int) -> None:
    store = EmbeddingStore.open(path)
    found = store.verify()
    assert found.sound, found
    assert len(store) == count
    assert np.isfinite(store.select().read("clip")).all()


def test_a_late_owner_stops_also_when_who_took_over_gave_up(store, hosts, monkeypatch):
    fill(store, node=0, round=1)

    def take_over_and_give_up() -> None:
        hosts.sleep(store.path)
        assert EmbeddingStore.open(store.path).delete(class_name="dog", index=99) == 0

    meanwhile(monkeypatch, take_over_and_give_up)
    with pytest.raises(ConflictError, match="another writer came in between"):
        fill(store, node=0, round=2)
    check_sound(store.path, 6)
    # And no one waits for who gave up.
    fill(EmbeddingStore.open(store.path), node=0, round=2)
    check_sound(store.path, 12)
