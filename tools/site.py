"""What `make docs` needs besides docs/: pages that lie elsewhere in the repository, for mkdocs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from click import Context
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fedgfe_store.cli.main import group

ROOT = Path(__file__).parents[1]

PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "notebooks/README.md": "notebooks.md",
    "examples/flower/README.md": "flower.md",
}
"""Where pages are in the repository, and in the site."""

FILES = [
    *(f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))),
    "fedgfe_store/models/families.toml",
    "examples/flower/pyproject.toml",
    "examples/flower/fedgfe_flower/client_app.py",
    "examples/flower/fedgfe_flower/server_app.py",
]
"""What pages link to besides: in the site at the same path, to be read or taken."""

_WIDTH = 84  # characters of a line of code in the site

_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of elsewhere, and the files that they link to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=to_site(text, source)))
    for name in FILES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead the links out of docs/ to the pages of the site, and fill in the options."""
    if page.file.src_uri == "options.md":
        return markdown + "\n".join(helps())
    return markdown if page.file.generated_by else to_site(markdown, "docs/index.md")


def helps() -> Iterator[str]:
    """Yield the help of the program and of each command, as a part of a page."""
    program = Context(
        group, info_name="fedgfe-store", help_option_names=["-h", "--help"], terminal_width=_WIDTH
    )
    yield f"\n```text\n{group.get_help(program)}\n```\n"
    for name in group.list_commands(program):
        command = group.get_command(program, name)
        assert command is not None  # it is in the list
        context = Context(command, program, info_name=name, terminal_width=_WIDTH)
        yield f"\n## {name}\n\n```text\n{command.get_help(context)}\n```\n"


def to_site(text: str, source: str) -> str:
    """Turn a page's links, relative to its place in the repository, into the site's.

    Parameters
    ----------
    text : str
        Markdown.
    source : str
        Where it lies in the repository.
    """
    return _LINK.sub(lambda link: _in_site(link[1], (ROOT / source).parent), text)


def _in_site(target: str, folder: Path) -> str:
    try:
        path = (folder / target).resolve().relative_to(ROOT)
    except ValueError:
        return target  # mkdocs says that it leads nowhere
    name = str(path)
    if path.parts[0] == "docs":
        return str(Path(*path.parts[1:]))
    return PAGES.get(name, name)
