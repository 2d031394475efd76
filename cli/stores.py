"""Making a store and looking at one: ``init`` and ``info``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .answer import answers
from .command import Command
from .options import as_of_option
from .tables import names, numbers, print_counts, size

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.schema import TensorColumn
    from fedgfe_store.store import EmbeddingStore

    from .finding import Context

_TENSOR = re.compile(
    r"(?P<name>[^=]+)=(?P<shape>\d{1,10}([x,]\d{1,10})*)(?P<words>(:[a-z0-9]+)*)", re.ASCII
)

_PACKINGS = {
    "bitshuffle": "lz4 after sorting bits: smallest",
    "shuffle": "lz4 after sorting bytes: larger and faster",
    "none": "as they are: largest, and read fastest",
}


@click.command(cls=Command)
@click.option(
    "--kind",
    default="flux",
    show_default=True,
    metavar="NAME",
    help="flux, sd, or with --tensor any other, such as sdxl or custom.",
)
@click.option(
    "--tensor",
    "tensors",
    multiple=True,
    metavar="NAME=SHAPE[:KIND]",
    help="A column of any shape, such as prompt_embeds=512x4096; after a colon bool, int32 or "
    "int64, ragged (up to that length) and optional. Several times.",
)
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
@click.option(
    "--compression",
    type=click.Choice(["bitshuffle", "shuffle", "none"]),
    default="bitshuffle",
    show_default=True,
    help="How values are packed: smallest; faster; not at all, which is read fastest.",
)
@click.option("--experiment", help="Name of the experiment, for the folder of images.")
@click.option("--model", help="Image model that generate uses by default.")
@click.option(
    "--shared",
    is_flag=True,
    help="Let many processes and machines write at once, in a folder or at a URL (extra cloud).",
)
@click.pass_obj
def init(
    obj: Context,
    kind: str,
    tensors: tuple[str, ...],
    tokens: int | None,
    clip_sequence: bool,
    precision: Any,
    compression: Any,
    experiment: str | None,
    model: str | None,
    shared: bool,
) -> None:
    """Make an empty store.

    \b
    fedgfe-store init --tokens 17 --precision bfloat16
    fedgfe-store --store sd.zarr init --kind sd
    fedgfe-store --store fast.zarr init --compression none
    fedgfe-store --store s3://bucket/embeddings.zarr init --shared
    fedgfe-store init --kind custom --tensor prompt_embeds=512x2304:ragged \\
      --tensor prompt_attention_mask=512:bool
    """
    from fedgfe_store import EmbeddingStore, Metadata, Schema

    if clip_sequence and (kind != "flux" or tensors):
        raise click.UsageError("--clip-sequence goes with --kind flux")
    if tokens and tensors:
        raise click.UsageError("--tokens goes without --tensor, which has shapes")
    metadata = Metadata(experiment=experiment, diffusion_type=kind, model=model)
    how = {"precision": precision, "compression": compression, "metadata": metadata}
    if tensors:
        columns = map(_column, tensors)
        schema = Schema.of(kind, *columns, **how)
    elif kind not in ("flux", "sd"):
        raise click.UsageError(f"--kind {kind} needs its columns: --tensor NAME=SHAPE")
    elif kind == "flux":
        clip = (77, 768) if clip_sequence else (768,)
        schema = Schema.flux(tokens or 17, clip=clip, **how)
    else:
        schema = Schema.sd(tokens or 77, **how)
    store = EmbeddingStore.create(obj.target, schema, shared=shared)
    click.echo(f"made {store.location} ({schema.describe()}, {schema.precision})")


def _column(text: str) -> TensorColumn:
    """Return the column that ``NAME=SHAPE[:KIND]`` declares."""
    from fedgfe_store.schema import TensorColumn

    declared = _TENSOR.fullmatch(text)
    words = declared["words"].split(":")[1:] if declared else []
    dtypes = [word for word in words if word not in ("ragged", "optional")]
    if declared is None or len(dtypes) > 1 or len(set(words)) < len(words):
        raise click.BadParameter(
            f"expected NAME=SHAPE[:bool|int32|int64][:ragged][:optional], got {text!r}",
            param_hint="--tensor",
        )
    options: dict[str, Any] = {"dtype": dtypes[0]} if dtypes else {}
    options |= {"ragged": "ragged" in words, "optional": "optional" in words}
    shape = tuple(int(n) for n in re.split("[x,]", declared["shape"]))
    return TensorColumn(declared["name"], shape, **options)


@click.command(cls=Command)
@as_of_option
@answers
@click.pass_obj
def info(obj: Context, as_of: int | None, answer: dict[str, Any]) -> None:
    """Show what a store holds: schema, size, and records by round and node.

    \b
    fedgfe-store info
    fedgfe-store --store other.zarr info --as-of 12
    """
    from fedgfe_store import EmbeddingStore

    store = EmbeddingStore.open(obj.store, as_of=as_of)
    records = store.select().records[["node", "round", "split", "class_name"]]
    sizes = store.snapshot.place.sizes()
    answer.update(_facts(store, records, sizes))
    for label, value in _summary(store, records, sizes):
        click.echo(f"{label + ':':<13}{value}")
    if len(records):
        click.echo("\nrecords by round and node")
        print_counts(records)


def _facts(
    store: EmbeddingStore, records: pd.DataFrame, sizes: Mapping[str, int] | None
) -> dict[str, Any]:
    schema, metadata = store.schema, store.schema.metadata
    counts = records.groupby(["round", "node"]).size().rename("records").reset_index()
    return {
        "store": store.location,
        "experiment": metadata.experiment,
        "kind": schema.kind,
        "columns": {column.name: column for column in schema.tensors},
        "precision": schema.precision,
        "compression": _packing(store),
        "commit": store.commit,
        "records": len(records),
        "bytes": None if sizes is None else sum(sizes.values()),
        "files": None if sizes is None else len(sizes),
        "splits": sorted(records["split"].unique()),
        "classes": sorted(records["class_name"].unique()),
        "model": metadata.model,
        "counts": counts.to_dict(orient="records"),
    }


def _packing(store: EmbeddingStore) -> str:
    """Return how values lie in the files, which is asked of these and not of what was wanted."""
    kinds = {files.compression for files in store.snapshot.tensor_files.values()}
    return ", ".join(sorted(kinds))


def _summary(
    store: EmbeddingStore, records: pd.DataFrame, sizes: Mapping[str, int] | None
) -> list[tuple[str, str]]:
    schema, metadata = store.schema, store.schema.metadata
    packing = _packing(store)
    plain = all(column.dtype == "float32" for column in schema.tensors)
    uncompressed = "of float32" if plain else "in memory"
    history = store.history()
    last = f", {history['time'].iloc[-1]:%Y-%m-%d %H:%M} UTC" if len(history) else ""
    return [
        ("store", str(store.location)),
        ("experiment", metadata.experiment or "-"),
        ("kind", schema.describe()),
        ("precision", schema.precision),
        ("compression", f"{packing} ({_PACKINGS[packing]})" if packing in _PACKINGS else packing),
        ("commit", f"{store.commit}{last}"),
        ("records", f"{len(records):,}"),
        ("on disk", f"{_usage(sizes)}"
         f" ({size(len(records) * schema.record_nbytes)} {uncompressed})"),
        ("nodes", names(records["node"].unique()) or "-"),
        ("rounds", numbers(records["round"].unique().tolist()) or "-"),
        ("splits", names(records["split"].unique()) or "-"),
        ("classes", names(records["class_name"].unique()) or "-"),
        ("model", metadata.model or "-"),
    ]  # fmt: skip


def _usage(sizes: Mapping[str, int] | None) -> str:
    if sizes is None:
        return "its server does not list files"
    return f"{size(sum(sizes.values()))} in {len(sizes):,} files"
