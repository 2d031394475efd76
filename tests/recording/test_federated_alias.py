"""`fedgfe_store.federated`, the old name of recording: imports and pickles of 0.1."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path

import pytest
from conftest import SMALL, values

import fedgfe_store
from fedgfe_store import EmbeddingStore, recording
from fedgfe_store.recording import fedgfe
from fedgfe_store.recording.fedgfe import EmbeddingClientMixin
from fedgfe_store.recording.writer import Missing

PUBLIC = {
    "batches": ["EmbeddingBatch"],
    "mixins": ["EmbeddingClientMixin", "EmbeddingServerMixin", "EmbeddingSource"],
    "recorder": ["LeftOut", "Missing", "OnError", "Recorder", "RoundBatch"],
    "settings": ["RecordingSettings"],
    "_jobs": ["LeftOut", "Pool"],
    "_pages": ["Page"],
    "_round": ["RoundBatch"],
    "_runs": ["Run"],
    "_target": ["Target"],
}
"""What lay in the submodules of 0.1, but for a class that nobody could pickle, `_jobs.Job`."""

# `pickle.dumps(client)` under 0.1, after it had recorded its split "train" of round 5.
PICKLED = (
    b"\x80\x04\x8c\x14test_federated_alias\x8c\x06Client\x93)\x81}(\x8c\x0f_embeddings_run\x8c\x1c"
    b"fedgfe_store.federated._runs\x8c\x03Run\x93)\x81}(\x8c\x02id\x8c\x100f605b97059d5f8d\x8c\t"
    b"_recorded\x8f(\x8c\x010\x94K\x05\x8c\x05train\x87\x90ub\x8c\x12missing_embeddings\x8c\x1f"
    b"fedgfe_store.federated.recorder\x8c\x07Missing\x93)\x81}(\x8c\x04nodeh\x00\x8c\x05roundK\x04"
    b"\x8c\x06reason\x8c\tdisk fullub\x85\x8c\x08settings\x8c\x1ffedgfe_store.federated.settings"
    b"\x8c\x11RecordingSettings\x93)\x81}(\x8c\x07enabled\x88\x8c\x0echeckpoint_dir\x8c\x0b"
    b"checkpoints\x8c\x0bnodes_everyK\x02\x8c\x0cserver_everyK\x01\x8c\x10other_experiment\x89ub"
    b"\x8c\x08left_out\x8c\x1cfedgfe_store.federated._jobs\x8c\x07LeftOut\x93ub."
)


class Client(EmbeddingClientMixin):
    id = 0

    def iter_embeddings(self, split):
        return [{"class_name": ["dog"], **values(1)}] if split == "train" else None


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one that has not imported the old name yet."""
    for name in [each for each in sys.modules if each.startswith("fedgfe_store.federated")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fedgfe_store, "federated", raising=False)


DEPRECATED = r"will go with 0\.3: Recorder is in fedgfe_store\.recording now"


@pytest.mark.usefixtures("unseen")
def test_the_old_name_gives_the_same_classes_and_says_the_new_one():
    with pytest.warns(DeprecationWarning, match=DEPRECATED) as warned:
        from fedgfe_store import federated
    assert warned[0].filename == __file__
    assert federated.Recorder is recording.Recorder
    for name in fedgfe.__all__:
        assert getattr(federated, name) is getattr(fedgfe, name)
    assert set(federated.__all__) == {"Recorder", *fedgfe.__all__}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_old_submodules_are_imported_under_their_names(name):
    with pytest.warns(DeprecationWarning, match=DEPRECATED):
        module = importlib.import_module(f"fedgfe_store.federated.{name}")
    for each in PUBLIC[name]:
        assert getattr(module, each)
    assert getattr(fedgfe_store.federated, name) is module


@pytest.mark.usefixtures("unseen")
def test_a_client_that_an_earlier_release_pickled_goes_on_with_its_run(tmp_path: Path):
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    with store.append(node=0, round=5) as batch:
        batch.add(split="train", class_name="dog", index=7, **values(1))
    with pytest.warns(DeprecationWarning, match=DEPRECATED):
        client = pickle.loads(PICKLED)
    assert client.missing_embeddings == (Missing("0", 4, "disk full"),)
    assert client.settings == fedgfe.RecordingSettings(True, "checkpoints", 2, 1)  # type: ignore[arg-type]
    # A client of another run would have taken the place of what was there.
    client.save_embeddings_to_checkpoint(split="train", checkpoint_dir=tmp_path, round_num=5)
    assert {key.index for key in EmbeddingStore.open(store.path).select().keys()} == {0, 7}
    assert b"federated._runs" not in pickle.dumps(client)
