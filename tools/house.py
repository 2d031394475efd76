"""How a package looks to somebody who reads it: its root, circles, lengths, parameters, comments.

Nothing is imported; the sources are parsed. What is counted:

- An import is an edge to the module that it names: ``from package import module`` to the module,
  ``from package import name`` to the package's ``__init__``. That Python runs the ``__init__`` of
  every package on the way to a module is no edge, as it is none for import-linter. Imports within
  functions and below ``if TYPE_CHECKING`` make circles, too, and are counted apart besides.
- A circle is a strongly connected component of two modules or more: circles that share a module
  are one.
- A function is a ``def``, nested ones and methods included; its lines go from ``def`` to its end,
  with its docstring, without its decorators. ``self`` and ``cls`` are no parameters, ``*args`` and
  ``**kwargs`` are one each.
- The public API is what the ``__all__`` of a package or of a module at the root exports: functions,
  and the public methods of classes. A command of click takes a parameter for each of its options:
  they are counted apart, too.
- A line of code has a token that is neither a comment nor a docstring, and a string that stands
  alone is a docstring wherever it stands. A comment line has a comment, beside code or alone.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

MOST_LINES = 400
"""Lines of a module above which it is counted as long."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
_FOR_A_TOOL = re.compile(r"#\s*(noqa|type:|pragma:|fmt:|ruff:|mypy:)")


@dataclass(frozen=True)
class Figure:
    """A number about the house, and where it is so, if it is so at one place."""

    name: str
    value: float
    where: str = ""


@dataclass(frozen=True)
class Import:
    """A module that is imported, and when: at import, in a function, or for types only."""

    module: str
    when: str


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    """As it is imported."""
    file: str
    """From the folder that holds the package's."""
    source: str
    is_package: bool

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source)

    @cached_property
    def lines(self) -> list[str]:
        """The lines, blank ones included."""
        return self.source.splitlines()

    @cached_property
    def exported(self) -> list[str]:
        """The names in ``__all__``."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and _names(node.targets) == ["__all__"]:
                return list(ast.literal_eval(node.value))
        return []

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the name of what ``from ... import`` imports from."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        up = node.level - self.is_package
        base = parts[: len(parts) - up]
        return ".".join([*base, *filter(None, [node.module])])


def read_modules(roots: Mapping[str, Path]) -> dict[str, Module]:
    """Read every source file below `roots`, folders by the name that they are imported as."""
    modules = {}
    for package, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join([package, *parts[: len(parts) - is_package]])
            file = path.relative_to(root.parent).as_posix()
            modules[name] = Module(name, file, path.read_text(encoding="utf-8"), is_package)
    return modules


def figures(roots: Mapping[str, Path]) -> list[Figure]:
    """Measure the packages in `roots`, of which the first is the one that has a root."""
    modules = read_modules(roots)
    root = next(iter(roots))
    return [
        *_files(modules, root),
        *_imports(modules),
        *_functions(modules, root),
        *_lines(modules),
    ]


def _files(modules: Mapping[str, Module], root: str) -> Iterator[Figure]:
    at_root = [m for m in modules.values() if Path(m.file).parent == Path(root)]
    yield Figure("files at the root", len(at_root))
    yield Figure("underscored files at the root", sum(map(_is_underscored, at_root)))
    yield Figure("underscored modules", sum(map(_is_underscored, modules.values())))
    yield Figure("modules", len(modules))
    longest = max(modules.values(), key=lambda module: len(module.lines))
    yield Figure("lines of the largest module", len(longest.lines), longest.file)
    long = [module.file for module in modules.values() if len(module.lines) > MOST_LINES]
    yield Figure(f"modules above {MOST_LINES} lines", len(long))
    exported = [module.exported for module in modules.values()]
    yield Figure(f"names in __all__ of {root}", len(modules[root].exported))
    yield Figure("names in every __all__", sum(map(len, exported)))


def _is_underscored(module: Module) -> bool:
    name = module.name.rpartition(".")[2]
    return name.startswith("_") and not name.startswith("__")


def imports_of(module: Module, modules: Mapping[str, Module]) -> set[Import]:
    """Return which of `modules` a module imports."""
    found: set[Import] = set()

    def look(node: ast.AST, when: str) -> None:
        for name in _imported(node, module):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module.name:
                found.add(Import(target, when))
        if isinstance(node, Function | ast.Lambda):
            when = "in a function"
        for child in ast.iter_child_nodes(node):
            for_types = isinstance(node, ast.If) and _is_for_types(node) and child in node.body
            look(child, "for types" if for_types else when)

    look(module.tree, "at import")
    return found


def _imported(node: ast.AST, module: Module) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{module.absolute(node)}.{alias.name}" for alias in node.names]
    return []


def _is_for_types(node: ast.If) -> bool:
    return ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of two nodes or more, the largest first."""
    reached = {node: _reached(node, edges) for node in edges}
    found = {
        tuple(sorted(other for other in reached[node] if node in reached[other])) for node in edges
    }
    return sorted((list(circle) for circle in found if len(circle) > 1), key=len, reverse=True)


def _reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        new = edges[ahead.pop()] - reached
        reached |= new
        ahead += new
    return reached


def _imports(modules: Mapping[str, Module]) -> Iterator[Figure]:
    imports = {name: imports_of(module, modules) for name, module in modules.items()}

    def edges(*when: str) -> dict[str, set[str]]:
        return {name: {i.module for i in own if i.when in when} for name, own in imports.items()}

    kinds = ("at import", "in a function", "for types")
    for name, graph in {
        "import circles": edges(*kinds),
        "the same without imports for types": edges(*kinds[:2]),
        "the same at import alone": edges(*kinds[:1]),
    }.items():
        found = circles(graph)
        yield Figure(name, len(found), f"largest: {len(found[0])} modules" if found else "")
    for when in kinds:
        yield Figure(
            f"imports {when}", sum(i.when == when for own in imports.values() for i in own)
        )


@dataclass(frozen=True)
class _Found:
    """A function, and where it lies."""

    module: Module
    node: Function
    of: ast.ClassDef | None

    @property
    def where(self) -> str:
        owner = f"{self.of.name}." if self.of else ""
        return f"{self.module.file}: {owner}{self.node.name}"

    @property
    def length(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def is_command(self) -> bool:
        called = (ast.unparse(each).partition("(")[0] for each in self.node.decorator_list)
        return any(name.rpartition(".")[2] == "command" for name in called)

    @property
    def parameters(self) -> int:
        of = self.node.args
        named = [*of.posonlyargs, *of.args]
        if self.of is not None and "staticmethod" not in map(ast.unparse, self.node.decorator_list):
            named = named[1:]
        return len(named) + len(of.kwonlyargs) + bool(of.vararg) + bool(of.kwarg)


def _functions(modules: Mapping[str, Module], root: str) -> Iterator[Figure]:
    found = [each for module in modules.values() for each in _defined(module, module.tree)]
    public = _public(modules, root)
    inner = [each for each in found if not _is_public(each, public)]
    yield _largest("parameters of the largest function", found, lambda f: f.parameters)
    yield _largest("the same outside the public API", inner, lambda f: f.parameters)
    plain = [each for each in inner if not each.is_command]
    yield _largest("the same without commands", plain, lambda f: f.parameters)
    yield Figure("functions", len(found))
    lengths = [each.length for each in found]
    for name, share in (("median", 50), ("90th percentile", 90)):
        value = np.percentile(lengths, share, method="inverted_cdf")
        yield Figure(f"lines of a function, {name}", int(value))
    yield _largest("lines of the longest function", found, lambda f: f.length)


def _largest(name: str, found: list[_Found], size: Callable[[_Found], int]) -> Figure:
    largest = max(found, key=size)
    return Figure(name, size(largest), largest.where)


def _defined(module: Module, node: ast.AST) -> Iterator[_Found]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield _Found(module, child, node if isinstance(node, ast.ClassDef) else None)
        yield from _defined(module, child)


def _public(modules: Mapping[str, Module], root: str) -> set[tuple[str, str]]:
    """Return what is exported, as the module that defines it and its name there."""
    return {
        _home(module, name, modules)
        for module in modules.values()
        if module.is_package or module.name.rpartition(".")[0] == root
        for name in module.exported
    }


def _home(module: Module, name: str, modules: Mapping[str, Module]) -> tuple[str, str]:
    """Follow a name through the modules that only hand it on."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = module.absolute(node)
                if (alias.asname or alias.name) == name and origin in modules:
                    return _home(modules[origin], alias.name, modules)
    return module.name, name


def _is_public(found: _Found, public: set[tuple[str, str]]) -> bool:
    if found.of is None:
        return (found.module.name, found.node.name) in public
    exported = (found.module.name, found.of.name) in public
    name = found.node.name
    return exported and (not name.startswith("_") or name.endswith("__"))


def _lines(modules: Mapping[str, Module]) -> Iterator[Figure]:
    code = sum(len(_code(module)) for module in modules.values())
    filled = sum(bool(line.strip()) for module in modules.values() for line in module.lines)
    comments = [comment for module in modules.values() for comment in _comments(module)]
    yield Figure("lines of code", code)
    yield Figure("lines not blank", filled)
    yield Figure("comment lines", len(comments))
    yield Figure("comment lines for a tool", sum(map(bool, map(_FOR_A_TOOL.match, comments))))
    yield Figure("comment lines per 100 not blank", round(100 * len(comments) / filled, 2))


def _tokens(module: Module) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(module.source).readline)


def _code(module: Module) -> set[int]:
    lines = {
        line
        for token in _tokens(module)
        if token.type not in _LAYOUT
        for line in range(token.start[0], token.end[0] + 1)
    }
    return lines - {
        line
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def _comments(module: Module) -> list[str]:
    return [token.string for token in _tokens(module) if token.type == tokenize.COMMENT]


def _names(targets: list[ast.expr]) -> list[str]:
    return [target.id for target in targets if isinstance(target, ast.Name)]
