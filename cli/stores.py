"""Making a store and looking at one: ``init`` and ``info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import as_of_option
from .tables import names, numbers, print_counts, size

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.store import EmbeddingStore

    from .main import Context


@click.command()
@click.option("--kind", type=click.Choice(["flux", "sd"]), default="flux", show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens per sequence [flux 17, sd 77].")
@click.option(
    "--clip-sequence", is_flag=True, help="flux: clip is a sequence [77, 768], not a vector [768]."
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 takes 0.4 of the space; pictures of a bfloat16 model stay the same.",
)
@click.option("--experiment", help="Name of the experiment, for the folder of images.")
@click.option("--model", help="Image model that generate uses by default.")
@click.pass_obj
def init(
    obj: Context,
    kind: str,
    tokens: int | None,
    clip_sequence: bool,
    precision: Any,
    experiment: str | None,
    model: str | None,
) -> None:
    """Make an empty store.

    \b
    fedgfe-store init --tokens 17 --precision bfloat16
    fedgfe-store --store sd.zarr init --kind sd
    """
    from fedgfe_store import EmbeddingStore, Metadata, Schema

    if clip_sequence and kind != "flux":
        raise click.UsageError("--clip-sequence goes with --kind flux")
    metadata = Metadata(experiment=experiment, diffusion_type=kind, model=model)
    if kind == "flux":
        clip = (77, 768) if clip_sequence else (768,)
        schema = Schema.flux(tokens or 17, clip=clip, precision=precision, metadata=metadata)
    else:
        schema = Schema.sd(tokens or 77, precision=precision, metadata=metadata)
    store = EmbeddingStore.create(obj.store, schema)
    click.echo(f"made {store.path} ({schema.describe()}, {schema.precision})")


@click.command()
@as_of_option
@click.pass_obj
def info(obj: Context, as_of: int | None) -> None:
    """Show what a store holds: schema, size, and records by round and node.

    \b
    fedgfe-store info
    fedgfe-store --store other.zarr info --as-of 12
    """
    from fedgfe_store import EmbeddingStore

    store = EmbeddingStore.open(obj.store, as_of=as_of)
    records = store.select().records[["node", "round", "split", "class_name"]]
    for label, value in _summary(store, records):
        click.echo(f"{label + ':':<13}{value}")
    if len(records):
        click.echo("\nrecords by round and node")
        print_counts(records)


def _summary(store: EmbeddingStore, records: pd.DataFrame) -> list[tuple[str, str]]:
    from fedgfe_store.storage.files import usage

    schema, metadata = store.schema, store.schema.metadata
    nbytes, files = usage(store.path)
    plain = all(column.dtype == "float32" for column in schema.tensors)
    uncompressed = "of float32" if plain else "in memory"
    history = store.history()
    last = f", {history['time'].iloc[-1]:%Y-%m-%d %H:%M} UTC" if len(history) else ""
    return [
        ("store", str(store.path)),
        ("experiment", metadata.experiment or "-"),
        ("kind", schema.describe()),
        ("precision", schema.precision),
        ("commit", f"{store.commit}{last}"),
        ("records", f"{len(records):,}"),
        ("on disk", f"{size(nbytes)} in {files:,} files"
         f" ({size(len(records) * schema.record_nbytes)} {uncompressed})"),
        ("nodes", names(records["node"].unique()) or "-"),
        ("rounds", numbers(records["round"].unique().tolist()) or "-"),
        ("splits", names(records["split"].unique()) or "-"),
        ("classes", names(records["class_name"].unique()) or "-"),
        ("model", metadata.model or "-"),
    ]  # fmt: skip
