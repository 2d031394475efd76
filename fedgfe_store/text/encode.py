"""Encoding what a plan of reference embeddings says, into its store, as one commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.models.devices import DTYPES, free_bytes
from fedgfe_store.models.fit import choose_offload
from fedgfe_store.models.placement import Placement
from fedgfe_store.records import TEXT_NODE, TEXT_ROUND, TEXT_SPLIT
from fedgfe_store.storage.engine import LOCK_TIMEOUT
from fedgfe_store.store import EmbeddingStore
from fedgfe_store.text.columns import as_stored
from fedgfe_store.text.encoders import (
    BATCH_TOKENS,
    OFFLOADS,
    TextEncoders,
    check_encoders,
    encoder_footprint,
)
from fedgfe_store.text.prompts import EncodingPlan, Reference, Report

# Short sequences would be hundreds to a batch, and progress would stand still.
_MOST_PROMPTS = 32


@dataclass(frozen=True)
class EncodingReport:
    """What became of a plan.

    Parameters
    ----------
    added, replaced : int
        Records that are new, and that took another's place.
    unchanged : int
        Records that were left as they are.
    seconds : float
        Time taken, loading included.
    """

    added: int
    replaced: int
    unchanged: int
    seconds: float


def encode_references(
    plan: EncodingPlan,
    *,
    offload: str = "auto",
    timeout: float = LOCK_TIMEOUT,
    report: Report = lambda remark: None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> EncodingReport:
    """Load the text encoders, encode what is to do, and append it as one commit.

    Values are those of diffusers' own ``encode_prompt``, which is what runs.

    Parameters
    ----------
    plan : EncodingPlan
        From `plan_references`.
    offload : {"auto", "none", "model", "sequential"}
        What a GPU holds: all encoders, one, or a layer; ``"auto"`` is the first that fits. Ignored
        on the CPU.
    timeout : float
        Seconds to wait for another writer.
    report : callable
        Gets remarks for the user, such as prompts that were cut.
    progress : callable
        Called with the number of prompts just encoded.

    Returns
    -------
    EncodingReport
        Counts; with nothing to do nothing is loaded and there is no commit.

    Raises
    ------
    NotFoundError
        If weights are missing and cannot be fetched.
    SchemaMismatchError
        If an option is unknown, or values are not finite; nothing is committed.
    ConflictError
        If another writer put something else there meanwhile.
    BusyError
        If another writer holds the store for longer than `timeout`.
    """
    if offload not in ("auto", *OFFLOADS):
        raise SchemaMismatchError(
            f"offload: expected auto, {', '.join(OFFLOADS[:-1])} or {OFFLOADS[-1]}, got {offload!r}"
        )
    started = time.monotonic()
    left = len(plan.references) - len(plan.todo)
    if not plan.todo:
        return EncodingReport(0, 0, left, 0.0)
    check_encoders(plan.model, fetch=True)
    with TextEncoders.load(plan.model, _placement(plan, offload, report)) as encoders:
        store = _opened(plan, timeout)
        batch = store.append(
            node=TEXT_NODE,
            round=TEXT_ROUND,
            if_exists=plan.if_exists,
            encoder=plan.encoder,
            timeout=timeout,
        )
        with batch:
            for part in _parts(plan):
                batch.add(**_records(plan, part, encoders, report))
                progress(len(part))
    seconds = time.monotonic() - started
    return EncodingReport(batch.added, batch.replaced, left + batch.skipped, seconds)


def _placement(plan: EncodingPlan, offload: str, report: Report) -> Placement:
    mode, remark = choose_offload(
        offload,
        device_type=plan.device.partition(":")[0],
        free_bytes=free_bytes(plan.device),
        footprint=encoder_footprint(plan.model, DTYPES[plan.dtype].itemsize),
        possible=OFFLOADS,
    )
    if remark and (offload != "auto" or mode != "none"):
        report(remark)
    return Placement(plan.dtype, plan.device, mode)


def _opened(plan: EncodingPlan, timeout: float) -> EmbeddingStore:
    if plan.exists:
        return EmbeddingStore.open(plan.path)
    return EmbeddingStore.create(plan.path, plan.schema, timeout=timeout)


def _parts(plan: EncodingPlan) -> Iterator[tuple[Reference, ...]]:
    step = min(_MOST_PROMPTS, max(1, BATCH_TOKENS // plan.tokens))
    for start in range(0, len(plan.todo), step):
        yield plan.todo[start : start + step]


def _records(
    plan: EncodingPlan, part: Sequence[Reference], encoders: TextEncoders, report: Report
) -> dict[str, Any]:
    """Encode a few references and give what `AppendBatch.add` takes."""
    prompts = [item.prompt for item in part]
    for remark in encoders.cut(prompts, plan.tokens):
        report(remark)
    sequence = plan.model.kind == "flux" and len(plan.schema.columns["clip"]) == 2
    values = encoders.encode(prompts, tokens=plan.tokens, clip_sequence=sequence)
    return {
        "split": TEXT_SPLIT,
        "class_name": [item.key.class_name for item in part],
        "index": [item.key.index for item in part],
        "extra": [plan.extra(prompt) for prompt in prompts],
        **as_stored(values, plan.schema, plan.columns),
    }
