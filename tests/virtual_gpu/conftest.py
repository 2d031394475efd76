"""Tests on a simulated GPU: ``make test-gpu``, in a process that begins with the device."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

import pytest
from virtual_gpu import device

if TYPE_CHECKING:
    from virtual_gpu.cases import Case

REQUIRED = "FEDGFE_REQUIRE_SIMULATED_GPU"
"""Where this is set, as ``.ci/run`` does, tests that cannot run fail."""

_loaded: list[device.Cards] = []


def pytest_configure(config: pytest.Config) -> None:
    reason = device.missing()
    if reason is None:
        cache = getattr(config, "cache", None)  # there is none with -p no:cacheprovider
        folder = cache.mkdir("simulated_gpu") if cache else Path(gettempdir()) / "simulated_gpu"
        library = device.build(folder)
        _loaded.append(device.load(library, cards=2))
        _import_without_cards("bitsandbytes")
    elif os.environ.get(REQUIRED):
        raise pytest.UsageError(f"no simulated GPU: {reason}")


def _import_without_cards(name: str) -> None:
    """Import a package, if it is there, without its kernels for real cards: others do as well."""
    if find_spec(name):
        import torch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _loaded:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"no simulated GPU: {device.missing()}"))


@pytest.fixture(scope="session")
def flux_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small random FLUX, its records, and the CPU's images of them."""
    from virtual_gpu.cases import make  # imports torch: the device has to be there before

    return make(tmp_path_factory.mktemp("made"), "flux")


@pytest.fixture(scope="session")
def sd_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same of a Stable Diffusion, whose guidance takes negative embeddings."""
    from virtual_gpu.cases import make

    return make(tmp_path_factory.mktemp("made"), "sd")


@pytest.fixture(scope="session")
def heavy_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A FLUX whose weights take far more than its work, with more records."""
    from virtual_gpu.cases import HEAVY, HEAVY_RECORDS, make

    return make(tmp_path_factory.mktemp("made"), "heavy", records=HEAVY_RECORDS, **HEAVY)


@pytest.fixture(params=["flux", "sd"])
def case(request: pytest.FixtureRequest) -> Case:
    """Either."""
    found: Case = request.getfixturevalue(f"{request.param}_case")
    return found


@pytest.fixture(autouse=True)
def cards() -> device.Cards:
    """Two cards of 1 GiB."""
    _loaded[0].reset()
    return _loaded[0]
