"""Job scripts of the old script: ``adopt``."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from .codes import SOME_FAILED
from .command import Command
from .tables import counted

_SCRIPT = "generate_images_from_checkpoint"
_NEW = "fedgfe-store generate"
_DEFAULT_FOLDER = "checkpoints/embeddings"
_GAP = r"(?:[ \t]|\\\r?\n)+"
_CALL = re.compile(
    rf"""(?<![\w./$-])
    (?: "?\$\{{?\w*PYTHON\w*\}}?"? | ['"]?[^\s'"=;|&(]*\bpython[\d.]* ['"]? )   # which Python
    (?: {_GAP} -(?: [WX] {_GAP} \S+ | (?!m\b)[a-zA-Z]\S* ) )*                   # its own options
    {_GAP}
    (?: -m {_GAP} [\w.]*{_SCRIPT}\b | ['"]?[^\s'"=;|&]*{_SCRIPT}\.py\b['"]? )""",
    re.VERBOSE,
)
_ARGUMENTS = re.compile(r"(?:\\\r?\n|[^\n;|&#])*")
_UNKNOWN = re.compile(r"\$(?:@|\*|\{|\w)")


@click.command("adopt", cls=Command)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE...",
)
@click.option("--in-place", is_flag=True, help="Change the files, and keep each as FILE.orig.")
@click.pass_context
def command(ctx: click.Context, /, files: tuple[Path, ...], in_place: bool) -> None:
    """Let job scripts call fedgfe-store instead of generate_images_from_checkpoint.py.

    Prints what changes, as a patch, and changes nothing unless --in-place. Any Python counts, with
    any options of its own. Where no checkpoint is named, the folder that the old script took
    then, checkpoints/embeddings, is.

    \b
    fedgfe-store adopt *.sh *.sbatch
    fedgfe-store adopt *.sh *.sbatch --in-place

    Exit code: 0 done, 3 some calls are of a form that is not known.
    """
    changed = left = 0
    for path in files:
        old = path.read_bytes().decode(errors="surrogateescape")
        new, notes = adopted(old)
        for note in notes:
            click.echo(f"note: {path}:{note}", err=True)
        for number, line in _left(new):
            click.echo(f"left as it is: {path}:{number}: {line}", err=True)
            left += 1
        if new == old:
            continue
        changed += 1
        if in_place:
            _write(path, new)
        else:
            click.echo(_patch(path, old, new), nl=False)
    what = f"{changed} changed" if in_place else f"{changed} to change; --in-place does it"
    click.echo(
        f"{counted(len(files), 'file')}, {what if changed else 'nothing to change'}",
        err=not in_place,
    )
    if left:
        ctx.exit(SOME_FAILED)


def adopted(text: str) -> tuple[str, list[str]]:
    """Return a script with the old script's calls replaced, and notes with line numbers."""
    notes = []

    def replaced(found: re.Match[str]) -> str:
        if _is_comment(text, found.start()):
            return found[0]
        given = _ARGUMENTS.match(text, found.end())
        arguments = given[0] if given else ""
        if "--checkpoint" in arguments:
            return _NEW
        number = text.count("\n", 0, found.start()) + 1
        if _UNKNOWN.search(arguments):
            notes.append(
                f"{number}: if no checkpoint is named there, add --checkpoint_dir {_DEFAULT_FOLDER}"
            )
            return _NEW
        notes.append(f"{number}: no checkpoint is named: {_DEFAULT_FOLDER}, as the old script had")
        return f"{_NEW} --checkpoint_dir {_DEFAULT_FOLDER}"

    return _CALL.sub(replaced, text), notes


def _is_comment(text: str, at: int) -> bool:
    return text[text.rfind("\n", 0, at) + 1 : at].lstrip().startswith("#")


def _left(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that still name the old script."""
    for number, line in enumerate(text.splitlines(), 1):
        if _SCRIPT in line and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _patch(path: Path, old: str, new: str) -> str:
    before, after = (text.splitlines(keepends=True) for text in (old, new))
    lines = difflib.unified_diff(before, after, str(path), str(path))
    text = "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)
    return text.encode(errors="replace").decode()


def _write(path: Path, text: str) -> None:
    """Put `text` in the place of a file, with its mode, after a copy of it was made."""
    from fedgfe_store.errors import ConflictError

    backup = path.with_name(f"{path.name}.orig")
    try:
        backup.open("xb").close()
    except FileExistsError:
        raise ConflictError(f"{backup}: is there already; {path} was not changed") from None
    shutil.copy2(path, backup)
    path.write_bytes(text.encode(errors="surrogateescape"))
