"""What tools.walk and tools.house measure: known numbers of a tiny package, and short trips."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from rich.console import Console

from tools.house import circles, figures
from tools.walk import lines, table, walk

INN = {
    "inn/__init__.py": """
        '''An inn.'''

        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from inn.rooms import Room

        __all__ = ["Room"]
        """,
    "inn/rooms.py": """
        '''Rooms, from
        two lines.'''

        from inn.kitchen import stove

        # The reason.
        BEDS = 2  # beside code
        "Of a room."


        class Room:
            def book(self, guest, /, nights, *, meals, **others):
                return stove.cook(
                    # for both
                    meals, nights
                )

            def _clean(self, a, b, c): ...

            @staticmethod
            def _lock(key): ...
        """,
    "inn/_cellar.py": """
        from inn import rooms  # noqa: F401
        """,
    "inn/kitchen/__init__.py": "",
    "inn/kitchen/stove.py": """
        def cook(*meals):
            from ..rooms import BEDS
            from . import _pan
            return [_pan, BEDS]
        """,
    "inn/kitchen/_pan.py": """
        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from inn.desk.bell import ring
        text = "# no comment"
        """,
    "desk/__init__.py": "",
    "desk/bell.py": """
        import inn.kitchen._pan

        @click.command("ring")
        def ring(a, b, c, d): return a
        """,
}


@pytest.fixture
def inn(tmp_path: Path) -> dict[str, Path]:
    for name, text in INN.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text).lstrip("\n"))
    return {"inn": tmp_path / "inn", "inn.desk": tmp_path / "desk"}


def test_the_figures_of_a_package_are_those_that_one_counts(inn):
    found = {each.name: each for each in figures(inn)}
    assert {name: each.value for name, each in found.items()} == {
        "files at the root": 3,
        "underscored files at the root": 1,
        "underscored modules": 2,
        "modules": 8,
        "lines of the largest module": 21,
        "modules above 400 lines": 0,
        "names in __all__ of inn": 1,
        "names in every __all__": 1,
        "import circles": 2,
        "the same without imports for types": 1,
        "the same at import alone": 0,
        "imports at import": 3,
        "imports in a function": 2,
        "imports for types": 2,
        "parameters of the largest function": 4,
        "the same outside the public API": 4,
        "the same without commands": 3,
        "functions": 5,
        "lines of a function, median": 1,
        "lines of a function, 90th percentile": 5,
        "lines of the longest function": 5,
        "lines of code": 26,
        "lines not blank": 32,
        "comment lines": 4,
        "comment lines for a tool": 1,
        "comment lines per 100 not blank": 12.5,
    }
    assert found["parameters of the largest function"].where == "inn/rooms.py: Room.book"
    assert found["the same outside the public API"].where == "desk/bell.py: ring"
    assert found["the same without commands"].where == "inn/rooms.py: Room._clean"
    assert found["lines of the longest function"].where == "inn/rooms.py: Room.book"
    assert found["lines of the largest module"].where == "inn/rooms.py"


def test_circles_that_share_a_module_are_one():
    edges = {"a": {"b"}, "b": {"c", "a"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(edges) == [["a", "b", "c"], ["d", "e"]]


def test_trips_pass_through_files_and_a_table_shows_them_beside_earlier_ones(tmp_path):
    walks = walk(["one append", "one batch"], tmp_path)
    for each in walks.values():
        assert 0 < len(each.entered) == len(set(each.entered)) < each.across < each.calls
        assert {file.partition("/")[0] for file in each.entered} == {"fedgfe_store"}
    now = {
        "commit": "now",
        "trips": {name: {**each.figures, "files": each.entered} for name, each in walks.items()},
        "house": {"modules": {"value": 7, "where": "there"}},
    }
    before = {"commit": "before", "trips": {}, "house": {"modules": {"value": 12, "where": ""}}}
    entered = len(walks["one append"].entered)
    assert lines(now)["one append", "files entered"] == (f"{entered}", "")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table([before, now]))
    said = [line.split() for line in captured.get().splitlines()]
    assert ["the", "house", "modules", "12", "7", "there"] in said
    assert ["one", "append", "files", "entered", "-", f"{entered}"] in said
