"""Recording embeddings from a training loop, without making it wait for the disk."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self, get_args

from fedgfe_store.common.location import location
from fedgfe_store.common.words import whole_number
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording.block import RoundBatch
from fedgfe_store.recording.pages import Block, LeftOut, Pool
from fedgfe_store.recording.preview import Preview, Previews, preview_of
from fedgfe_store.recording.target import Run, Target
from fedgfe_store.recording.writer import Missing, OnError, Writer
from fedgfe_store.schema import Metadata, Precision
from fedgfe_store.storage.engine import LOCK_TIMEOUT
from fedgfe_store.storage.incoming import checked_keys
from fedgfe_store.storage.sifting import IfExists
from fedgfe_store.store import EmbeddingStore

__all__ = ["LeftOut", "Missing", "OnError", "Recorder", "RoundBatch"]

BUFFER_BYTES = 512 * 2**20
"""Bytes of records that wait for the writer by default before training waits, too: some 1,900 of
FLUX, 17 tokens of T5 and a vector of CLIP each."""


class Recorder:
    """Appends what a training loop computes to a store: one commit per node and round.

    Records are copied to the CPU as they are added, and nothing of the tensors given is kept. A
    thread of its own writes them, in order, so that training goes on meanwhile. Use it as a
    context, or `close` it; what waits is also written when the interpreter exits. After
    `flush` everything recorded so far is on the disk: call it before a training checkpoint is
    saved, so that a run that is killed and goes on from there misses no round.

    Parameters
    ----------
    store : EmbeddingStore or path-like
        Where to record; a store that is given stays as it is until its `refresh`. A store that
        is not there is made when the first records are committed, from their shapes.
    every : int
        Which rounds are `due`: those that it divides; 0 for none.
    if_exists : {"replace", "error", "skip"}
        What to do with a record that the store has already, as after a restart. With
        ``"replace"`` the first block of this recorder for a node, round and split takes the place
        of all that earlier runs left of it, in the same commit, and the log says how many records
        went: training data comes shuffled, so the same samples may come under other indices.
        Further blocks of this recorder add to it. With ``"skip"`` and ``"error"`` records are
        compared by key alone, and what does not come again stays.
    keep_earlier : bool
        Under ``"replace"``, keep what does not come again, too: where several processes, each
        with its recorder, record parts of one node, round and split.
    on_error : {"raise", "warn"}
        What a problem of the store, such as a full disk, does: ``"raise"`` raises it from the
        next call of `record`, `flush` or `close`; ``"warn"`` logs it, lists the round in
        `missing`, and lets training go on.
    background : bool
        Write in a thread; otherwise a block of `record` ends when its commit is on the disk,
        and raises its error itself.
    buffer_bytes : int
        Bytes of records, as float32, that may wait for the writer; then adding more waits, too.
        The memory is taken as it is needed, kept for the next records, and freed by `close`.
    precision : {"float32", "bfloat16"}, optional
        How a store that is made here keeps values, by default ``"float32"``; one that is there
        must keep them so.
    metadata : Metadata, optional
        What a store that is made here knows of the experiment. Classes join as they are
        recorded. An encoder or an experiment's name that differs from that of a store that is
        there is refused at once; where either has no name there is nothing to compare.
    other_experiment : bool
        Record to a store of an experiment of another name; what has the same keys is replaced.
    images_dir : str, optional
        Folder that ``image_path`` in the records' ``extra`` names, as FedGFE's checkpoints do.
    preview : Preview or int, optional
        Have some records of each round rendered by another process while training goes on; a
        number says how many. Nothing waits for it: while one is being made, that of the next round
        is left out, and what goes wrong with it is a line in the log. It ends with this process.
    timeout : float
        Seconds that a commit waits for another writer.

    Raises
    ------
    SchemaMismatchError
        If an option is not one of those above, or does not fit the store that is there.
    DamagedDataError
        If the store that is there is damaged.

    Examples
    --------
    >>> with Recorder("embeddings.zarr", every=5) as recorder:  # doctest: +SKIP
    ...     for round in range(1, 41):
    ...         train(round)
    ...         if recorder.due(round):
    ...             with recorder.record(node=0, round=round) as batch:
    ...                 batch.add(split="train", class_name=names, index=numbers, t5=t5, clip=clip)
    """

    def __init__(
        self,
        store: EmbeddingStore | str | os.PathLike[str],
        *,
        every: int = 1,
        if_exists: IfExists = "replace",
        keep_earlier: bool = False,
        on_error: OnError = "raise",
        background: bool = True,
        buffer_bytes: int = BUFFER_BYTES,
        precision: Precision | None = None,
        metadata: Metadata | None = None,
        other_experiment: bool = False,
        images_dir: str | None = None,
        preview: Preview | int | None = None,
        timeout: float = LOCK_TIMEOUT,
    ) -> None:
        _check_choice("if_exists", if_exists, IfExists)
        _check_choice("on_error", on_error, OnError)
        self.every = whole_number("every", every)
        self.path = store.location if isinstance(store, EmbeddingStore) else location(store)
        target = Target(
            self.path,
            precision=precision,
            metadata=metadata or Metadata(),
            other_experiment=other_experiment,
            if_exists=if_exists,
            keep_earlier=keep_earlier,
            timeout=timeout,
            images_dir=images_dir,
        )
        pool = Pool(whole_number("buffer_bytes", buffer_bytes))
        self._run = Run()
        shown = preview_of(preview)
        self._writer = Writer(
            target,
            pool,
            on_error=on_error,
            background=background,
            previews=None if shown is None else Previews(self.path, shown),
        )

    @property
    def missing(self) -> tuple[Missing, ...]:
        """The nodes and rounds that could not be committed, and have not been since."""
        return self._writer.missing

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The records of committed rounds that were left out, as their values are not finite."""
        return self._writer.left_out

    def due(self, round: int) -> bool:
        """Whether `round` is to be recorded: `every` divides it."""
        return self.every > 0 and round % self.every == 0

    def record(self, *, node: str | int | None = None, round: int) -> RoundBatch:
        """Open a block whose records become one commit when it ends.

        Parameters
        ----------
        node : str or int, optional
            Federated node: 0, 1, ... or ``"server"``. Without one each call of
            `RoundBatch.add` says it, and the whole round is one commit.
        round : int
            Federated round, from 0.

        Returns
        -------
        RoundBatch
            A context. If the block raises, nothing of it is committed and the exception passes.

        Raises
        ------
        ConflictError
            If the recorder is closed, belongs to the process that this one was forked from, or
            another block of this thread is open.
        FedgfeStoreError or OSError
            What became of an earlier block, under ``on_error="raise"``.
        """
        return self._block(node, round, self._run)

    def _block(self, node: str | int | None, round: int, run: Run) -> RoundBatch:
        """As `record`, as a part of `run`."""
        self._writer.check_usable()
        self._writer.raise_errors()
        given = {"round": round} if node is None else {"node": node, "round": round}
        columns = checked_keys(given, 1)
        name = None if node is None else str(columns["node"][0])
        number = int(columns["round"][0])
        return RoundBatch(self._writer, Block(name, number, run, self._writer.pool))

    def flush(self) -> None:
        """Wait until everything recorded so far is committed and on the disk.

        Raises
        ------
        FedgfeStoreError or OSError
            What became of a block, under ``on_error="raise"``.
        """
        self._writer.flush()

    def close(self) -> None:
        """Write what waits, end the thread, and log what is missing; a second call does nothing.

        In a process forked from the recorder's own it does nothing: what waits is not its own.

        Raises
        ------
        FedgfeStoreError or OSError
            As for `flush`.
        """
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._writer.leave()


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        expected = ", ".join(get_args(choices))
        raise SchemaMismatchError(f"{name}: expected one of {expected}, got {value!r}")
