"""Run the notebooks from a clean kernel and keep what they show.

    python tools/run_notebooks.py [--demo demo] [notebooks/01_query.ipynb ...]

Each notebook runs in its own folder on the demo's and is saved in place. A cell that fails ends
the run, and its notebook stays as it was.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).parent.parent / "notebooks"


@click.command()
@click.argument("notebooks", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--demo",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="demo",
    show_default=True,
    help="The folder that `make demo` made.",
)
def main(notebooks: tuple[Path, ...], demo: Path) -> None:
    """Run NOTEBOOKS, by default all, from a clean kernel and save what they show in place."""
    for file in notebooks or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        nbformat.write(execute(file, demo), file)
        seconds = time.perf_counter() - started
        click.echo(f"{file.name}: {seconds:.0f} s, {file.stat().st_size / 1e3:.0f} kB")


def execute(file: Path, demo: Path) -> nbformat.NotebookNode:
    """Return a notebook as a clean kernel leaves it, without what differs between machines."""
    notebook: nbformat.NotebookNode = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:
        # Sockets rather than ports: ipykernel warns of those, as others could listen.
        kernel = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        client = NotebookClient(
            notebook,
            timeout=300,
            resources={"metadata": {"path": str(file.parent)}},
            record_timing=False,
            config=Config({"KernelManager": kernel}),
        )
        client.execute(env=os.environ | {"FEDGFE_DEMO": str(demo.resolve())})
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    return notebook


if __name__ == "__main__":
    main()
