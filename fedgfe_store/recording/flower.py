"""Recording in a Flower app: `pack` in the ClientApp, `RecordingMixin` before the strategy.

A reply carries a node's embeddings beside its parameters, and the server records them: a round is
one commit, since Flower has all replies of a round before it averages any.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedgfe_store.common.extra import extra
from fedgfe_store.common.plain import Unusable
from fedgfe_store.common.words import size as shown_size
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording.block import RoundBatch
from fedgfe_store.recording.recorder import Recorder
from fedgfe_store.records import NOTE_COLUMNS, SERVER, TEXT_NODE, from_milliseconds
from fedgfe_store.shapes import any_tensor
from fedgfe_store.storage.incoming import checked_columns

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.serverapp import Grid

_flower: Any = extra("flwr.app", "recording in Flower", "flower")

Batches = Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""What `RoundBatch.add` takes by keyword, once or several times."""

MESSAGE_BYTES = 2**30
"""Bytes of embeddings that `pack` puts into a reply at most. Flower cuts arrays into pieces of
5 MiB and has no limit itself; but the ServerApp's memory grows by four times what nodes send."""

_DUE = "fedgfe-record"
_TENSORS, _RECORDS = "fedgfe.tensors", "fedgfe.records"
_FORM = 1
"""Of what `pack` makes; a client and a server of different releases may meet."""
_log = logging.getLogger("fedgfe_store")
_KNOWN = ("split", "class_name", "index", *NOTE_COLUMNS)


def node_name(context: Context) -> str:
    """Return a SuperNode's name: ``node`` of its ``--node-config``, else ``partition-id``.

    Where neither is given it is the number that Flower drew for it, another one each start.
    """
    config = context.node_config
    return str(config.get("node", config.get("partition-id", context.node_id)))


def is_due(message: Message) -> bool:
    """Whether the server wants this round's embeddings, as `RecordingMixin` says in the config."""
    return any(bool(config.get(_DUE)) for config in message.content.config_records.values())


def pack(
    node: Context | str | int, batches: Batches, *, limit: int = MESSAGE_BYTES
) -> dict[str, ArrayRecord | ConfigRecord]:
    """Return what a reply carries besides its own: ``content.update(pack(context, batches))``.

    Parameters
    ----------
    node : Context or str or int
        The ClientApp's context, see `node_name`, or the node's name in the store.
    batches : mapping or iterable of mapping
        What `RoundBatch.add` takes: ``split``, ``class_name``, tensors such as ``t5`` and
        ``clip``, and further ``index``, ``file_id``, ``sample_id``, ... Tensors travel in their
        own dtype, float64 as float32: in bfloat16 they take half, which a store of that precision
        keeps as it is.
    limit : int
        Bytes of tensors that may travel.

    Returns
    -------
    dict
        An ArrayRecord and a ConfigRecord by names of their own, for a RecordDict.

    Raises
    ------
    SchemaMismatchError
        If there is more than `limit`, or a value that cannot travel.
    """
    name = node if isinstance(node, str | int) else node_name(node)
    arrays: dict[str, Any] = {}
    told: list[dict[str, Any]] = []
    for batch in _each(batches):
        notes = _plain_notes({name: batch.get(name) for name in _KNOWN})
        tensors = {}
        for column, value in batch.items():
            if column not in _KNOWN and value is not None:
                tensor, form = _travelling(column, value)
                tensors[column] = form
                arrays[f"{len(told)}.{column}"] = tensor
        told.append({"notes": notes, "tensors": tensors})
    size = sum(tensor.nbytes for tensor in arrays.values())
    if size > limit:
        raise SchemaMismatchError(
            f"node {name}: expected at most {shown_size(limit)} of embeddings in a reply, got "
            f"{shown_size(size)}: send them as bfloat16, fewer samples or fewer tokens; or record "
            f"them at the node, with a Recorder and a store of its own, and merge the stores"
        )
    records = json.dumps({"form": _FORM, "node": _own_name(str(name)), "batches": told})
    return {
        _TENSORS: _flower.ArrayRecord({k: _flower.Array(t.numpy()) for k, t in arrays.items()}),
        _RECORDS: _flower.ConfigRecord({"records": records}),
    }


class RecordingMixin:
    """Records what replies carry, before any strategy: ``class Mine(RecordingMixin, FedAvg)``.

    Embeddings are taken out of the replies before the strategy sees these, as it wants no arrays
    but parameters. The nodes' and the server's of a round become one commit, so a server that is
    killed leaves every round whole or not there.

    Parameters
    ----------
    *args, **options
        Of the strategy.
    recorder : Recorder
        Where to; its `due` says which rounds. Close it, or use it as a context, as it writes in
        the background.
    server_embeddings : callable, optional
        Called in each round that is due with Flower's round and the ArrayRecord that the strategy
        made of the replies; returns batches as `pack` takes them, which are recorded as node
        ``server``.
    rounds_before : int
        Rounds of an earlier run that this one goes on from: Flower counts from 1 again.

    Raises
    ------
    SchemaMismatchError
        From `aggregate_train`, if embeddings do not fit the store, or two nodes have one name.
    """

    def __init__(
        self,
        *args: Any,
        recorder: Recorder,
        server_embeddings: Callable[[int, ArrayRecord], Batches] | None = None,
        rounds_before: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.recorder, self.server_embeddings = recorder, server_embeddings
        self.rounds_before = rounds_before

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's; the config says whether embeddings are wanted, see `is_due`."""
        config[_DUE] = self.recorder.due(server_round + self.rounds_before)
        messages: Iterable[Message] = super().configure_train(  # type: ignore[misc]
            server_round, arrays, config, grid
        )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy's, of replies without their embeddings, which are recorded."""
        replies = list(replies)
        carried = [_taken_out(reply) for reply in replies]
        result: tuple[ArrayRecord | None, MetricRecord | None]
        result = super().aggregate_train(server_round, replies)  # type: ignore[misc]
        number = server_round + self.rounds_before
        if not self.recorder.due(number):
            if any(each is not None for each in carried):
                _log.warning("round %d is not due: the embeddings of replies are left", number)
        else:
            with self.recorder.record(round=number) as block:
                _add_replies(block, [each for each in carried if each is not None])
                if self.server_embeddings is not None and result[0] is not None:
                    for batch in _each(self.server_embeddings(server_round, result[0])):
                        block.add(node=SERVER, **batch)
        return result


def _each(batches: Batches) -> Iterable[Mapping[str, Any]]:
    return [batches] if isinstance(batches, Mapping) else batches


_Carried = tuple[int, "ArrayRecord", "ConfigRecord"]
"""Which of Flower's nodes a reply is from, and what `pack` made there."""


def _taken_out(reply: Message) -> _Carried | None:
    """Return what `pack` put into a reply, which is without it then."""
    if reply.has_error() or _RECORDS not in reply.content:
        return None
    records, arrays = reply.content.pop(_RECORDS), reply.content.pop(_TENSORS)
    return reply.metadata.src_node_id, arrays, records


def _add_replies(block: RoundBatch, carried: list[_Carried]) -> None:
    """Add what nodes packed to `block`, node by node."""
    known: dict[str, int] = {}
    for sender, arrays, records in carried:
        where = f"{block}, reply of Flower's node {sender}"
        told = _unpacked(records, where)
        node = _own_name(told["node"])
        if node in known:
            raise SchemaMismatchError(
                f"{where}: expected a name of its own, got {node!r} as node {known[node]} has it "
                f"(--node-config 'partition-id=0' or 'node=\"name\"')"
            )
        known[node] = sender
        for position, batch in enumerate(told["batches"]):
            tensors = {
                column: _arrived(arrays[f"{position}.{column}"].numpy(), form)
                for column, form in batch["tensors"].items()
            }
            try:
                block.add(node=node, **_notes(batch["notes"]), **tensors)
            except SchemaMismatchError as error:
                raise SchemaMismatchError(f"{where} ({node}): {error}") from None


def _unpacked(records: ConfigRecord, where: str) -> Any:
    told = json.loads(str(records["records"]))
    if told["form"] != _FORM:
        raise SchemaMismatchError(
            f"{where}: expected embeddings packed as form {_FORM}, got form {told['form']}: "
            f"another release of fedgfe-store is installed there"
        )
    return told


def _own_name(node: str) -> str:
    """Return the name of a node, unless it is one that no client has."""
    if node in (SERVER, TEXT_NODE):
        raise SchemaMismatchError(f"node: expected a client's name, got {node!r}")
    return node


def _travelling(column: str, value: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return values as numpy has them, and how to make of them what they were."""
    form: dict[str, Any] = {}
    if isinstance(value, list | tuple):  # ragged: one tensor a record
        parts = [_tensor(column, each) for each in value]
        try:
            value = torch.cat(parts)
        except (RuntimeError, ValueError) as error:
            raise SchemaMismatchError(
                f"{column}: expected sequences that differ in their first axis alone, got "
                f"{[list(each.shape) for each in parts]}"
            ) from error
        form["lengths"] = [len(each) for each in parts]
    tensor = _tensor(column, value)
    if tensor.dtype is torch.float64:
        tensor = tensor.float()
    if tensor.dtype is torch.bfloat16:
        form["dtype"] = "bfloat16"
        tensor = tensor.contiguous().view(torch.int16)
    return tensor, form


def _tensor(column: str, value: Any) -> torch.Tensor:
    try:
        return any_tensor(value, column).cpu()
    except Unusable as reason:
        raise SchemaMismatchError(str(reason)) from None


def _arrived(values: Any, form: Mapping[str, Any]) -> torch.Tensor | list[torch.Tensor]:
    tensor = torch.from_numpy(values)
    if form.get("dtype") == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return list(tensor.split(form["lengths"])) if "lengths" in form else tensor


def _plain_notes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys and notes as JSON can hold them, checked here: at the server all would stop."""
    counts = [_count(value) for value in given.values()]
    several = next((count for count in counts if count is not None), None)
    n = 1 if several is None else several  # one for all records, however many tensors bring
    # Those without an index are counted at the server; here any will do.
    index = range(n) if given["index"] is None else given["index"]
    keys = {"node": "0", "round": 0, "index": index}
    keys |= {name: given[name] for name in ("split", "class_name")}
    checked = checked_columns(keys, {name: given[name] for name in NOTE_COLUMNS}, n)
    notes = {}
    for name, value in given.items():
        if value is not None or name == "timestamp":
            values = checked[name].tolist()
            if name == "extra":
                values = [json.loads(each) if each else None for each in values]
            notes[name] = values[0] if several is None else values
    return notes


def _count(value: Any) -> int | None:
    """Return how many values a sequence has; None where it is one value."""
    if isinstance(value, str | Mapping) or getattr(value, "ndim", 1) == 0:
        return None
    return len(value) if hasattr(value, "__len__") else None


def _notes(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys and notes as `RoundBatch.add` takes them."""
    moments = told["timestamp"]
    if isinstance(moments, list):
        made: Any = [None if each is None else from_milliseconds(each) for each in moments]
    else:
        made = from_milliseconds(moments)
    return {**told, "timestamp": made}
