"""Reference text embeddings from a model's own text encoders: ``encode``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from fedgfe_store.common.location import Location

from .answer import answers
from .command import Command
from .options import class_names, device_option, own_device, quiet_option, wait_option
from .progress import progress
from .tables import counted, print_table

if TYPE_CHECKING:
    from fedgfe_store.text import EncodingPlan, EncodingReport, Reference

    from .finding import Context


@click.command("encode", cls=Command)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    default=("a photo of a {class}",),
    show_default=True,
    help="What to encode; {class} stands for the class. May be repeated: index 0, 1, ...",
)
@click.option(
    "--class", "classes", multiple=True, metavar="NAMES", help="Classes: dog,drum [the store's]."
)
@click.option("--model", help="Hub id or folder [$FEDGFE_MODEL, the store's].")
@click.option(
    "--diffusion-type",
    "--diffusion_type",
    metavar="FAMILY",
    help="Family of the model: flux, sd, sdxl, ... [the store's, else the model's own].",
)
@click.option(
    "--family", metavar="FILE", help="File that declares a family of models that is not known."
)
@click.option(
    "--max-sequence-length",
    "--max_sequence_length",
    type=click.IntRange(min=1),
    help="Tokens of a sequence [the store's, else the pipeline's own; 17 for FLUX].",
)
@device_option
@click.option(
    "--offload",
    type=click.Choice(["auto", "none", "model", "sequential"]),
    default="auto",
    show_default=True,
    help="What the GPU holds: all encoders, one, a layer.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in [bfloat16 on a GPU, float32 on the CPU].",
)
@click.option(
    "--if-exists",
    type=click.Choice(["error", "replace", "skip"]),
    default="error",
    show_default=True,
    help="What becomes of records that the store has from another prompt, encoder or dtype.",
)
@click.option("--dry-run", is_flag=True, help="List what would be encoded and stop.")
@wait_option
@quiet_option
@answers
@click.pass_obj
def command(
    obj: Context,
    /,
    prompts: tuple[str, ...],
    classes: tuple[str, ...],
    offload: str,
    timeout: float,
    dry_run: bool,
    quiet: bool,
    answer: dict[str, Any],
    **options: Any,
) -> None:
    """Encode prompts about classes by the model's own text encoders, into the store.

    They become node text, round 0, split reference: what adapters' embeddings are trained
    towards, to be compared with them and rendered beside them. What the store has from the same
    prompt is not encoded again. The store is made if it is not there.

    \b
    fedgfe-store encode
    fedgfe-store encode --prompt "the sound of a {class}" --class dog,drum --dry-run
    fedgfe-store generate --node 0,text --class dog
    """
    from fedgfe_store.storage.engines import check_target
    from fedgfe_store.text import encode_references, plan_references

    store = obj.store
    check_target(store)
    names = _class_names(store, classes)
    options["device"] = own_device(options["device"])
    plan = plan_references(store, prompts, report=_remark, classes=names, **options)
    answer.update(
        store=plan.path, model=plan.model.name, references=plan.references, dry_run=dry_run
    )
    if dry_run or not quiet:
        _print_plan(plan, whole=dry_run)
    if dry_run:
        return
    with progress(len(plan.todo), "prompts", quiet=quiet) as advance:
        report = encode_references(
            plan, offload=offload, timeout=timeout, report=_remark, progress=advance
        )
    answer.update(vars(report))
    _print_result(plan, report)


def _class_names(path: Location, texts: Sequence[str]) -> list[str] | None:
    """Return the classes that were named, and remark on those that no record is of."""
    from fedgfe_store import EmbeddingStore
    from fedgfe_store.errors import NotFoundError

    if not texts:
        return None
    try:
        selection = EmbeddingStore.open(path).select()
    except NotFoundError:
        selection = None
    return class_names(texts, selection, _remark)


def _remark(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def _print_plan(plan: EncodingPlan, *, whole: bool) -> None:
    made = "" if plan.exists else ", to be made"
    click.echo(f"store: {plan.path} ({plan.schema.describe()}){made}")
    model = plan.model
    click.echo(f"model: {model.name} ({model.revision[:12]}), {plan.dtype} on {plan.device}")
    todo = set(plan.todo)
    if whole:
        rows = [
            (item.key.class_name, item.key.index, item.prompt, _state(item, item in todo))
            for item in plan.references
        ]
        print_table(("class", "index", "prompt", "state"), rows, right=("index",))
        click.echo(f"{counted(len(todo), 'prompt')} to encode; dry run, nothing written")


def _state(item: Reference, to_encode: bool) -> str:
    if item.status == "done":
        return "in the store"
    if item.status == "missing":
        return "to encode"
    return f"{'to replace' if to_encode else 'kept'}: {item.reason}"


def _print_result(plan: EncodingPlan, report: EncodingReport) -> None:
    encoded = report.added + report.replaced
    parts = [f"{counted(encoded, 'text embedding')} encoded in {report.seconds:.1f} s"]
    if not encoded:
        parts = ["nothing to encode"]
    if report.replaced:
        parts.append(f"{report.replaced:,} replaced")
    if report.unchanged:
        parts.append(f"{report.unchanged:,} unchanged")
    click.echo(f"{', '.join(parts)}; node text of {plan.path}")
