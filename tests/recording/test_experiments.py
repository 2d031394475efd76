"""Two experiments that would share a store are told apart when recording begins."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import values

from cli.main import group
from fedgfe_store import EmbeddingStore, Metadata, Schema
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording import Recorder
from fedgfe_store.recording.fedgfe import EmbeddingClientMixin, EmbeddingServerMixin

FIRST, SECOND = Metadata(experiment="vegas"), Metadata(experiment="esc50")
REFUSED = r"experiment: expected 'vegas' as in .*embeddings\.zarr, got 'esc50'"


def made(path, metadata: Metadata, tokens: int = 3) -> EmbeddingStore:
    sizes: dict[str, Any] = {"width": 8, "clip": (4,)} if tokens == 3 else {}
    return EmbeddingStore.create(path, Schema.flux(tokens, metadata=metadata, **sizes))


def put(recorder: Recorder, round: int) -> None:
    with recorder.record(node=0, round=round) as batch:
        batch.add(split="train", class_name="dog", index=range(2), **values(2, round))


def test_a_recorder_of_another_experiment_is_refused_when_it_is_made(tmp_path):
    path = made(tmp_path / "embeddings.zarr", FIRST).path
    with pytest.raises(SchemaMismatchError, match=REFUSED + ".*other_experiment=True"):
        Recorder(path, metadata=SECOND)
    with pytest.raises(SchemaMismatchError, match=REFUSED):
        Recorder(EmbeddingStore.open(path), metadata=SECOND, on_error="warn")
    with Recorder(path, metadata=SECOND, other_experiment=True) as recorder:
        put(recorder, 1)
    assert len(EmbeddingStore.open(path)) == 2


@pytest.mark.parametrize(
    ("of_the_store", "of_the_recorder"),
    [(FIRST, FIRST), (Metadata(), FIRST), (FIRST, Metadata()), (FIRST, None)],
)
def test_the_same_name_and_none_are_no_conflict(tmp_path, of_the_store, of_the_recorder):
    path = made(tmp_path / "embeddings.zarr", of_the_store).path
    for round in (1, 2):  # as a run that is resumed
        with Recorder(path, metadata=of_the_recorder) as recorder:
            put(recorder, round)
    assert len(EmbeddingStore.open(path)) == 4


def test_a_store_that_another_experiment_made_meanwhile_is_refused_too(tmp_path):
    path = tmp_path / "embeddings.zarr"
    recorder = Recorder(path, metadata=Metadata(experiment="esc50"))
    made(path, FIRST, tokens=17)
    recorder_values = values(2, 0, Schema.flux(17))
    with pytest.raises(SchemaMismatchError, match=REFUSED), recorder:
        with recorder.record(node=0, round=1) as batch:
            batch.add(split="train", class_name="dog", **recorder_values)
    assert str(recorder.missing[0]).startswith("node 0, round 1 (experiment:")


def test_an_encoder_that_differs_is_refused_when_the_recorder_is_made(tmp_path):
    path = made(tmp_path / "embeddings.zarr", Metadata(encoder="t5-a")).path
    with pytest.raises(SchemaMismatchError, match=r"encoder: expected 't5-a' as in .*, got 't5-b'"):
        Recorder(path, metadata=Metadata(encoder="t5-b"))


class Named:
    def embedding_metadata(self, checkpoint_dir):
        return SECOND

    def iter_embeddings(self, split):
        tensors = values(1, 1, Schema.flux(17))
        return [{"class_name": "dog", **tensors}] if split == "train" else None


class Client(Named, EmbeddingClientMixin):
    id = 0


def server(folder, bases=(Named, EmbeddingServerMixin), **settings) -> Any:
    """Return a server at round 1 that records to `folder`."""
    section = {"save_embeddings_instead_of_images": True, "embeddings_checkpoint_dir": folder}
    made = type("Server", bases, {})()
    made.config, made.clients, made.round = (
        SimpleNamespace(feda2v=section | settings),
        [Client()],
        1,
    )
    return made


def test_a_server_finds_another_experiments_store_before_it_trains(tmp_path):
    made(tmp_path / "embeddings.zarr", FIRST, tokens=17)
    with pytest.raises(
        SchemaMismatchError, match=REFUSED + r".*feda2v\.embeddings_other_experimen"
    ):
        server(tmp_path).prepare_embeddings()
    with pytest.raises(SchemaMismatchError, match=REFUSED):
        Client().save_embeddings_to_checkpoint("train", tmp_path, 1)
    meant = server(tmp_path, embeddings_other_experiment=True)
    meant.prepare_embeddings()
    meant.save_round_embeddings()
    client = Client()
    client.embedding_other_experiment = True
    client.save_embeddings_to_checkpoint("train", tmp_path, 2)
    keys = EmbeddingStore.open(tmp_path / "embeddings.zarr").select().keys()
    assert [(key.node, key.round) for key in keys] == [("0", 1), ("server", 1), ("0", 2)]


def test_the_name_of_a_folder_is_compared_with_nothing(tmp_path):
    """A folder of checkpoints may have been renamed since, or its store imported."""
    folder = tmp_path / "vegas_10n_10c"
    made(folder / "embeddings.zarr", FIRST, tokens=17)
    unnamed = type(
        "Unnamed", (Named,), {"embedding_metadata": EmbeddingServerMixin.embedding_metadata}
    )
    host = server(folder, (unnamed, EmbeddingServerMixin))
    host.clients = []
    assert host.save_round_embeddings() == folder / "embeddings.zarr"


def test_a_value_that_is_no_switch_is_refused(tmp_path):
    with pytest.raises(
        SchemaMismatchError, match=r"feda2v.embeddings_other_experiment: expected tr"
    ):
        server(tmp_path, embeddings_other_experiment="yes").prepare_embeddings()


def test_the_demo_records_to_no_other_experiments_store(tmp_path):
    made(tmp_path / "demo" / "embeddings.zarr", FIRST, tokens=17)
    result = CliRunner().invoke(group, ["demo", "--output-dir", str(tmp_path / "demo"), "--quiet"])
    assert result.exit_code == 1
    assert re.search(r"experiment: expected 'vegas' as in .*, got 'demo'", result.output)
