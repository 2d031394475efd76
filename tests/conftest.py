"""What several test files share: small stores with known values."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from processes import finished

from fedgfe_store import EmbeddingStore, Schema

if TYPE_CHECKING:
    from browser import Watched
    from playwright.sync_api import Browser
    from proxy import Proxy

# torch is not imported yet; child processes inherit it. Threads of several processes that wait for
# one another busily take many times as long where a machine does other work, too.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # tables into a pipe would be in bold letters
    os.environ.pop(name, None)
# Chance is for those who look for faults, with --hypothesis-profile=explore; others test the same.
settings.register_profile("explore", deadline=None)
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.load_profile("any machine")

SMALL = Schema.flux(3, width=8, clip=(4,), granule=4)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the simulated GPU to ``make test-gpu``: it has to be there before torch."""
    asked = any("virtual_gpu" in argument for argument in config.args)
    return True if collection_path.name == "virtual_gpu" and not asked else None


MODELS = {"flux", "sd", "clip", "demo", "tiny_model"}
"""Fixtures that are models, or made with one."""


EVERY_MODEL = {
    "test_families",
    "test_tiny_families",
    "test_families_encoded",
    "test_lora",
    "test_residency",
    "test_placement",
}
"""Files whose tests are made of each of many models."""

# The others are packed and plain latents, a U-Net and transformers, a vector, a mask, and sequences
# that are cut. By name: `tiny_families` would import torch, before a simulated GPU is there.
STOOD_FOR = {
    *("flux-schnell", "sd", "sdxl-turbo", "sdxl-lcm", "sd3", "flux2-dev", "flux2-klein"),
    *("flux2-klein-base", "pixart-alpha", "chroma", "sana", "lumina2", "qwen-image"),
}
"""Models that others stand for where there is little time."""


def _is_long(item: pytest.Item) -> bool:
    """Whether a test is one of many alike, of a model that others stand for."""
    given = getattr(item, "callspec", None)
    return given is not None and any(
        isinstance(value, str) and value in STOOD_FOR for value in given.params.values()
    )


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures that they use, and let the longest files begin.

    Processes side by side that begin with those end at about the same time.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & MODELS:
            item.add_marker("model")
        if "demo" in fixtures:
            item.add_marker("slow")
        if item.path.stem in EVERY_MODEL and _is_long(item):
            item.add_marker("long")
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def values(n: int, seed: int = 0, schema: Schema = SMALL) -> dict[str, np.ndarray]:
    """Tensors of `n` records that fit `schema`, from a normal distribution."""
    rng = np.random.default_rng(seed)
    return {
        t.name: rng.standard_normal((n, *t.shape), dtype=np.float32)
        for t in schema.tensors
        if not t.optional
    }


def fill(
    store: EmbeddingStore, *, node: str | int, round: int, classes: str = "dog cat", n: int = 3
) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Append `n` records of each class as one commit; return what was given, by class and index."""
    given = {}
    with store.append(node=node, round=round) as batch:
        for number, name in enumerate(classes.split()):
            seed = (int(node) + 1 if str(node).isdecimal() else 0) * 10_000 + round * 100 + number
            tensors = values(n, seed, store.schema)
            batch.add(
                split="train",
                class_name=name,
                index=range(n),
                sample_id=[f"train_{i}" for i in range(n)],
                **tensors,
            )
            for i in range(n):
                given[name, i] = {column: array[i] for column, array in tensors.items()}
    return given


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a FLUX of random weights, tiny and without encoders."""
    from generation_fakes import save_random_flux

    return save_random_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of the models in `tiny_families`, by name; each is made once a process."""

    @cache
    def folder(name: str, *, encoders: bool = False) -> Path:
        from tiny_families import save

        return save(name, tmp_path_factory.mktemp("models") / name, encoders=encoders)

    return folder


BUCKET = "experiments"
"""Of the S3 server."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """An empty page; one opened in it must say nothing, ask nothing and load only its own files."""
    from browser import empty_page

    with empty_page(browser) as page:
        yield page
    assert page.messages == []
    assert page.dialogs == []
    assert page.failed == []
    assert [url for url in page.requests if not url.startswith(("file://", "data:"))] == []


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 server in the memory of this process, with a bucket: its URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from servers import s3_server

    with s3_server() as url:
        urlopen(Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield url


@pytest.fixture
def aws(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Proxy]]:
    """The usual variables, and what puts a proxy before the S3 server, as `Faults` says.

    They name the server, and then the latest proxy. All end with the test.
    """
    from proxy import Faults, proxied

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": s3,
    }.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:

        def proxy(**faults: Any) -> Proxy:
            made = stack.enter_context(proxied(s3, Faults(**faults)))
            monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
            return made

        yield proxy


_watched: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event == "open" and not isinstance(arguments[0], int):
        file = Path(os.fsdecode(arguments[0]))  # type: ignore[arg-type]
        _watched.append(f"{file.parent.name}/{file.name}")


sys.addaudithook(_watch)


@pytest.fixture
def reads() -> Iterator[list[str]]:
    """Files that were opened, as folder and name: ``t5/c.0.0.0``."""
    global _watching
    _watched.clear()
    _watching = True
    yield _watched
    _watching = False


@dataclass(frozen=True)
class Demo:
    folder: Path
    output: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run `fedgfe-store demo` once, as `make demo` does; each process of tests has a copy."""
    own = tmp_path_factory.mktemp("newcomer")
    of_all = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_all = of_all.parent
    made, said = of_all / "made", of_all / "said.txt"
    with FileLock(of_all / "demo.lock"):
        if not said.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            command = [sys.executable, "-m", "fedgfe_store.cli.main", "demo"]
            done = finished(command, cwd=made)
            said.write_text(done.stdout)
    shutil.copytree(made / "demo", own / "demo")
    return Demo(own / "demo", said.read_text())
