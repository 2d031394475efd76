"""README and docs: their Python runs, and their commands print what they show."""

from __future__ import annotations

import re
import shlex
import shutil
from typing import Any

import pytest
from click import Context
from click.testing import CliRunner
from places import ROOT
from printed import near, numbers, words

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import _COMMANDS, group

PAGES = ["README.md", "docs/index.md", "docs/commands.md", "docs/from_the_old_script.md"]
EVERY = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
WITH_PYTHON = ["README.md", "docs/notebook.md", "docs/training.md", "docs/how-to.md"]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(demo, tmp_path, monkeypatch):
    """A copy of the demo's folder, as a newcomer stands in it."""
    shutil.copytree(demo.folder, tmp_path / "demo")
    monkeypatch.chdir(tmp_path / "demo")


@pytest.mark.parametrize("page", PAGES)
def test_commands_print_what_the_page_shows(page, folder):
    shown = blocks(page, "console")
    assert shown
    for block in shown:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            program, *arguments = shlex.split(command)
            assert program == "fedgfe-store"
            result = CliRunner().invoke(group, arguments)
            assert words(result.output) == words(output), command
            assert numbers(result.output) == near(output), command


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs_in_the_demos_folder(page, folder):
    parts = blocks(page, "python")
    assert parts
    names: dict[str, Any] = {}
    for part in parts:
        exec(compile(part, page, "exec"), names)
    if page == "docs/notebook.md":
        assert names["drift"] > 0
        assert names["ds"].sizes["record"] == 480
    if page == "docs/training.md":
        assert len(names["store"]) == 6
        assert names["padded"].shape == (2, 512, 2304)
        assert names["lengths"].tolist() == [20, 31]
        assert len(EmbeddingStore.open(names["path"])) == 2


def test_the_old_scripts_page_shows_the_same_numbers_by_either_way(folder, capsys):
    """Its Python, then and now, says the same of the demo's records."""
    then, now = blocks("docs/from_the_old_script.md", "python")
    shutil.copytree("embeddings.zarr", "checkpoints/embeddings/embeddings.zarr")
    exec(compile(then, "then", "exec"), {})
    before = capsys.readouterr().out
    exec(compile(now, "now", "exec"), {})
    now = capsys.readouterr().out
    assert before.replace("torch.Size([1, 17, 4096])", "(17, 4096)") == now
    assert "Embeddings: 30" in now


def test_commands_that_are_only_shown_could_be_typed():
    """Of those whose output no page shows, each has options that there are."""
    text = "\n".join(block for path in EVERY for block in blocks(path, "sh")).replace("\\\n", " ")
    lines = re.findall(r"(?:^|&& |no-python )(fedgfe-store .*)", text, re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        _, *typed = shlex.split(re.split(r" [>|#&] ?", line)[0])
        _, (name, *rest), _ = group.make_parser(Context(group)).parse_args(typed)
        command = group.get_command(Context(group), name)
        assert command is not None, line
        command.make_parser(Context(command)).parse_args(rest)  # raises where there is none


def test_every_command_is_documented():
    text = (ROOT / "docs/commands.md").read_text()
    assert [name for name in _COMMANDS if f"\n## {name}\n" not in text] == []


def test_links_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_the_changelog_has_an_unreleased_section():
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()
