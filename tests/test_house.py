"""docs/architecture.md names every room and every step of the ways through them."""

from __future__ import annotations

import re
import tomllib

import pytest
from places import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")
PACKAGE = ROOT / "fedgfe_store"


def test_every_room_is_described_in_the_order_in_which_imports_may_point() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    rooms = [room.strip() for layer in reversed(layers) for room in layer.split("|")]
    described = re.findall(r"^\| `(\w+)/?` \|", PAGE, re.MULTILINE)
    assert set(described) - {"cli"} == set(rooms) - {"federated", "__main__"}
    assert set(rooms) == {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()
    } - {"__init__", "__pycache__"}


@pytest.mark.parametrize("step", re.findall(r"\b[a-z]+/[a-z_]+\b", PAGE))
def test_every_step_is_a_module(step: str) -> None:
    if not step.startswith(("docs/", "cli/")):
        assert (PACKAGE / f"{step}.py").is_file() or (PACKAGE / step).is_dir()


def test_no_module_is_longer_than_a_person_reads_at_once() -> None:
    modules = [*PACKAGE.rglob("*.py"), *(ROOT / "cli").glob("*.py")]
    longest = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in modules}
    assert {name: n for name, n in longest.items() if n > 400} == {}


def test_nothing_inside_a_package_has_an_underscore() -> None:
    names = [path.name for path in PACKAGE.rglob("_*.py")] + [
        path.name for path in (ROOT / "cli").glob("_*.py")
    ]
    assert set(names) == {"__init__.py", "__main__.py"}
