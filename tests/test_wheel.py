"""What is installed where there is no repository: the wheel, from the tree and from the sdist."""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import fill
from places import ROOT
from processes import finished

from fedgfe_store import EmbeddingStore, Schema, __version__

BUILD = (sys.executable, "-m", "build", "--no-isolation")

pytestmark = pytest.mark.slow


def made_here(folder: str, names: list[str]) -> set[str]:
    """Return what no clone has, for `copytree`."""
    patterns = [".*", "__pycache__", "*.egg-info"]
    if Path(folder) == ROOT:
        patterns += ["build", "demo", "dist"]
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def output_of(*command: str | Path, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = finished(command, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel by their path."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a clone has it: building writes into it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "tree", ignore=made_here))


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel that `python -m build` makes: an sdist first, and the wheel from that."""
    dist = tree.parent / "dist"
    output_of(*BUILD, "--outdir", dist, folder=tree)
    (file,) = dist.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and beside it what the tests' one has."""
    folder = tmp_path_factory.mktemp("elsewhere")
    output_of(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # An editable install does not come along: `.pth` files in these folders are not looked at.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others))
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    output_of(*pip, "--no-index", "--no-deps", wheel, folder=folder)
    where = output_of(python, "-c", "import fedgfe_store as f; print(f.__file__)", folder=folder)
    assert Path(where.strip()).is_relative_to(packages)
    return python.parent


def test_it_holds_the_packages_with_their_data_and_nothing_else(tree, wheel):
    files = [
        path
        for folder in ("fedgfe_store", "cli")
        for path in (tree / folder).rglob("*")
        if path.is_file()
    ]
    expected = {
        str(Path("fedgfe_store" if path.is_relative_to(tree / "cli") else "")
            / path.relative_to(tree)): path.read_bytes()
        for path in files
    }  # fmt: skip
    about = f"fedgfe_store-{__version__}.dist-info/"
    held = contents(wheel)
    assert {name: held[name] for name in held if not name.startswith(about)} == expected
    assert held[about + "licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    names = [Path(name).name for name in expected]
    assert {"py.typed", "page.html", "notebook.html", "main.py"} <= set(names)
    assert any(name.endswith(".safetensors") for name in names)


def test_the_tree_makes_the_same_wheel_as_the_sdist(tree, wheel, tmp_path):
    output_of(*BUILD, "--wheel", "--outdir", tmp_path, folder=tree)
    assert contents(tmp_path / wheel.name) == contents(wheel)


def files_below(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if not {"build", "__pycache__"} & set(path.parts)}


def test_the_sdist_is_the_repository(tree, wheel, tmp_path):
    """What `make test` and `make docs` need is in it."""
    (file,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    lacking = files_below(tree) - files_below(folder)
    assert {name for name in lacking if not name.startswith(".")} == set()
    assert (folder / "tests" / "test_wheel.py").is_file()


def test_the_wheel_holds_every_module(tree, wheel):
    """A folder of the package has to be named in setup.cfg."""
    modules = {f"fedgfe_store/{name}" for name in files_below(tree / "fedgfe_store")}
    modules |= {f"fedgfe_store/cli/{name}" for name in files_below(tree / "cli")}
    assert {name for name in modules if name.endswith(".py")} <= set(contents(wheel))


def test_the_program_says_its_version(installed, tmp_path):
    assert __version__ in output_of(installed / "fedgfe-store", "--version", folder=tmp_path)


def test_xarray_knows_the_engine(installed, tmp_path):
    code = "import xarray as x; print(x.backends.list_engines()['fedgfe'].__module__)"
    assert output_of(installed / "python", "-c", code, folder=tmp_path).startswith("fedgfe_store.")


def test_it_renders_with_the_model_that_it_brings(installed, tmp_path):
    # A store of its own: that of the demo would have to be waited for.
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", Schema.flux(17))
    fill(store, node="server", round=1, classes="dog", n=1)
    words: list[str | Path] = [
        "--store",
        store.path,
        "generate",
        "--model",
        "tiny",
        "--output-dir",
        "images",
    ]
    said = output_of(installed / "fedgfe-store", *words, folder=tmp_path)
    assert "1 image rendered" in said
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


@pytest.mark.long
def test_the_demo_runs(installed, tmp_path):
    said = output_of(installed / "fedgfe-store", "demo", folder=tmp_path)
    assert "480 images rendered" in said
    assert len(list((tmp_path / "demo").glob("output_images/**/*.png"))) == 480
    assert (tmp_path / "demo" / "contact_sheet.png").is_file()
