"""FedGFE's methods for saving embeddings, writing to a store instead of ``.pt`` files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.names import STORE_NAME
from fedgfe_store.recording.fedgfe.entries import EmbeddingBatch, is_empty
from fedgfe_store.recording.fedgfe.settings import DEFAULT_DIR, RecordingSettings
from fedgfe_store.recording.preview import Preview
from fedgfe_store.recording.recorder import Missing, OnError, Recorder, RoundBatch
from fedgfe_store.recording.target import Run
from fedgfe_store.schema import Metadata, Precision

_log = logging.getLogger("fedgfe_store")
_of_this_round: ContextVar[Recorder | None] = ContextVar("recorder of this round", default=None)
"""While `save_round_embeddings` runs: where clients and server record to, in the background."""


class EmbeddingSource:
    """What clients and servers share: where their embeddings come from, and saving them.

    A host class gives `iter_embeddings`; everything else has a default that it may override.

    Attributes
    ----------
    embedding_splits : tuple of str
        The splits that ``split="all"`` means.
    embedding_precision : {"float32", "bfloat16"} or None
        How a new store keeps values, see `Recorder`.
    embedding_on_error : {"raise", "warn"}
        Whether a problem of the store ends the training, see `Recorder`.
    embedding_keep_earlier : bool
        Whether what earlier runs left of a node, round and split stays when it is recorded
        again, see `Recorder`.
    embedding_other_experiment : bool
        Whether it is meant that the store is of an experiment of another name than
        `embedding_metadata` gives, see `Recorder`; in a configuration
        ``feda2v.embeddings_other_experiment``.
    embedding_preview : Preview, int or None
        Have some records of each round rendered while training goes on, see `Recorder`.
    missing_embeddings : tuple of Missing
        Under ``"warn"``: the rounds that could not be recorded, and have not been since. The
        server's has those of all nodes that `EmbeddingServerMixin.save_round_embeddings` records.
    """

    embedding_splits: tuple[str, ...] = ("train", "val", "test")
    embedding_precision: Precision | None = None
    embedding_on_error: OnError = "raise"
    embedding_keep_earlier: bool = False
    embedding_other_experiment: bool = False
    embedding_preview: Preview | int | None = None
    missing_embeddings: tuple[Missing, ...] = ()

    def iter_embeddings(self, split: str) -> Iterable[EmbeddingBatch | Mapping[str, Any]] | None:
        """Yield the embeddings of a split, a batch at a time, in the same order every round.

        Parameters
        ----------
        split : str
            One of `embedding_splits`, or whatever ``split`` the caller of
            `EmbeddingClientMixin.save_embeddings_to_checkpoint` gave.

        Returns
        -------
        iterable of EmbeddingBatch or mapping, or None
            See `EmbeddingBatch.of`; entries as they stood in FedGFE's checkpoints will do, and
            those whose tensors are None are left out and counted. None or nothing where there is
            no such split.
        """
        raise NotImplementedError(
            f"{type(self).__name__} needs a method iter_embeddings(split) that yields "
            f"EmbeddingBatch or mappings with class_name, t5 and clip"
        )

    @property
    def embedding_node(self) -> str | int:
        """The node's name in the store: the host's `id`, as FedGFE's clients have it."""
        node: str | int = getattr(self, "id", None)  # type: ignore[assignment]
        if node is None:
            raise SchemaMismatchError(
                f"{type(self).__name__}: expected an attribute id (0, 1, ...), got none; "
                f"or override embedding_node"
            )
        return node

    def embedding_metadata(self, checkpoint_dir: Path) -> Metadata:
        """Return what a new store knows of the experiment.

        By default it is named after the folder of checkpoints; that name is not compared with the
        store's, which may have been moved or named otherwise. One that a host class gives is: a
        store of an experiment of another name is refused. Classes join as they are recorded.
        """
        return Metadata(experiment=checkpoint_dir.resolve().name or None)

    def _save(
        self, splits: Iterable[str], checkpoint_dir: str | Path, round_num: int | None
    ) -> Path:
        """Record the embeddings of `splits` as one commit, and return the store."""
        path = Path(checkpoint_dir) / STORE_NAME
        number = 0 if round_num is None else round_num
        shared = _of_this_round.get()
        if shared is not None and shared.path == path:
            self._record(shared, splits, number)
            return path
        with self._recorder(path, background=False) as recorder:
            self._record(recorder, splits, number)
        self._keep_missing(recorder, number, str(self.embedding_node))
        return path

    def _recorder(self, path: Path, *, background: bool, other: bool = False) -> Recorder:
        metadata = self.embedding_metadata(path.parent)
        by_folder = type(self).embedding_metadata is EmbeddingSource.embedding_metadata
        images = getattr(self, "images_output_dir", None) or "output_images"
        return Recorder(
            path,
            background=background,
            keep_earlier=self.embedding_keep_earlier,
            on_error=self.embedding_on_error,
            precision=self.embedding_precision,
            metadata=metadata,
            preview=self.embedding_preview,
            other_experiment=other or by_folder or self.embedding_other_experiment,
            images_dir=f"{images}/{metadata.experiment}" if metadata.experiment else str(images),
        )

    def _record(self, recorder: Recorder, splits: Iterable[str], number: int) -> None:
        # A run is as long as the host lives, whichever recorder it comes to.
        run: Run = vars(self).setdefault("_embeddings_run", Run())
        with recorder._block(self.embedding_node, number, run) as batch:
            for split in splits:
                self._add(batch, split)

    def _keep_missing(self, recorder: Recorder, number: int, node: str | None = None) -> None:
        others = [
            each
            for each in self.missing_embeddings
            if each.round != number or node not in (None, each.node)
        ]
        self.missing_embeddings = (*others, *recorder.missing)

    def _add(self, batch: RoundBatch, split: str) -> None:
        empty = 0
        for item in self.iter_embeddings(split) or ():
            if is_empty(item):
                empty += 1
                continue
            given = EmbeddingBatch.of(item, node=str(self.embedding_node), split=split)
            batch.add(split=split, **vars(given))
        if empty:
            _log.warning("%s, split %s: %d entries without tensors left out", batch, split, empty)


class EmbeddingClientMixin(EmbeddingSource):
    """Gives a FedGFE client the method that saves its embeddings.

    It goes before the client's own class, so that it takes the place of a method of that name:
    ``class Client(EmbeddingClientMixin, clientA2V)``. See `EmbeddingSource` for what it needs.
    """

    def save_embeddings_to_checkpoint(
        self,
        split: str = "all",
        checkpoint_dir: str | Path = DEFAULT_DIR,
        round_num: int | None = None,
    ) -> Path:
        """Record this node's embeddings, as one commit.

        Saving split by split adds to what is there. Saving again replaces the records that come
        again. What another host object, such as that of a run that was killed, left of this node,
        round and split is replaced as a whole when it is saved for the first time.

        Parameters
        ----------
        split : str
            A split, or ``"all"`` for those of `embedding_splits`.
        checkpoint_dir : path-like
            Folder of checkpoints; the store is ``embeddings.zarr`` in it.
        round_num : int, optional
            Federated round; None counts as 0, as in the name of FedGFE's file.

        Returns
        -------
        Path
            The store. The records are on the disk (where `save_round_embeddings` calls this,
            when that returns), or, under ``embedding_on_error = "warn"``, the log says why not.

        Raises
        ------
        SchemaMismatchError
            If what `iter_embeddings` yields does not fit, or not the store.
        FedgfeStoreError or OSError
            If the store cannot be written.
        """
        splits = self.embedding_splits if split == "all" else (split,)
        return self._save(splits, checkpoint_dir, round_num)


class EmbeddingServerMixin(EmbeddingSource):
    """Gives a FedGFE server the method that saves its embeddings, and one for the round's end.

    It goes before the server's own class: ``class Server(EmbeddingServerMixin, FedA2V)``. See
    `EmbeddingSource` for what it needs. `save_round_embeddings` further needs the host's
    ``clients``, ``config.feda2v``, and ``current_round`` or ``round``.
    """

    _embedding_settings: RecordingSettings | None = None

    @property
    def embedding_node(self) -> str | int:
        """The server's name in the store."""
        return "server"

    @property
    def embedding_round(self) -> int:
        """The round that ends: the host's `current_round`, or `round` as FedGFE's server has it."""
        for name in ("current_round", "round"):
            number = getattr(self, name, None)
            if number is not None:
                return int(number)
        raise SchemaMismatchError(
            f"{type(self).__name__}: expected an attribute current_round or round, got neither"
        )

    def save_server_embeddings_to_checkpoint(
        self, checkpoint_dir: str | Path = DEFAULT_DIR, round_num: int | None = None
    ) -> Path:
        """Record the server's embeddings of all `embedding_splits`, as one commit.

        Parameters and errors are those of `EmbeddingClientMixin.save_embeddings_to_checkpoint`.
        """
        return self._save(self.embedding_splits, checkpoint_dir, round_num)

    def prepare_embeddings(self) -> RecordingSettings:
        """Read and check ``config.feda2v``, and log what will be recorded.

        `save_round_embeddings` does so at the end of the first round; called when the server has
        its clients, it finds a mistake before any training.

        Raises
        ------
        SchemaMismatchError
            If a value does not fit, a client lacks `EmbeddingClientMixin`, or the store that is
            there is of another experiment, encoder or precision.
        """
        settings = RecordingSettings.read(self._feda2v())
        clients = self._embedding_clients()
        for client in clients if settings.enabled else ():
            if not callable(getattr(client, "save_embeddings_to_checkpoint", None)):
                raise SchemaMismatchError(
                    f"client {getattr(client, 'id', client)!r}: expected a method "
                    f"save_embeddings_to_checkpoint, got a {type(client).__name__} without; add "
                    f"EmbeddingClientMixin to its bases"
                )
        if settings.enabled:
            self._round_recorder(settings).close()  # a store that does not fit is found here
        _log.info("%s", settings.describe(len(clients)))
        self._embedding_settings = settings
        return settings

    def save_round_embeddings(self) -> Path | None:
        """Record what `config` asks for at the end of this round: for `round_ending_hook`.

        The clients' and the server's methods are called in turn; while one computes its
        embeddings, those before it are written. When this returns, all are on the disk.

        Returns
        -------
        Path or None
            The store; None where nothing was due.

        Raises
        ------
        SchemaMismatchError
            As for `prepare_embeddings` and `save_server_embeddings_to_checkpoint`.
        FedgfeStoreError or OSError
            If the store cannot be written.
        """
        settings = self._embedding_settings or self.prepare_embeddings()
        number = self.embedding_round
        if not settings.enabled:
            return None
        due = _due(number, settings.nodes_every), _due(number, settings.server_every)
        if not any(due):
            return None
        clients = self._embedding_clients() if due[0] else []
        with self._round_recorder(settings) as recorder:
            token = _of_this_round.set(recorder)
            try:
                for client in clients:
                    client.save_embeddings_to_checkpoint(
                        split="all", checkpoint_dir=settings.checkpoint_dir, round_num=number
                    )
                if due[1]:
                    self.save_server_embeddings_to_checkpoint(
                        checkpoint_dir=settings.checkpoint_dir, round_num=number
                    )
            finally:
                _of_this_round.reset(token)
        self._keep_missing(recorder, number)
        return settings.store_path

    def _round_recorder(self, settings: RecordingSettings) -> Recorder:
        return self._recorder(settings.store_path, background=True, other=settings.other_experiment)

    def _feda2v(self) -> Any:
        config = getattr(self, "config", None)
        if config is None:
            raise SchemaMismatchError(
                f"{type(self).__name__}: expected an attribute config with a section feda2v, got "
                f"none"
            )
        if isinstance(config, Mapping):
            return config.get("feda2v")
        return getattr(config, "feda2v", None)

    def _embedding_clients(self) -> list[Any]:
        return list(getattr(self, "clients", ()))


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
