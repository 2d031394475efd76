"""Previews while training: which are started, that nothing waits for them, and how they end."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import legacy
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill, values
from curves import tensorboard
from PIL import Image
from processes import finished, started, until

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.recording import Preview, Recorder
from fedgfe_store.recording.fedgfe import EmbeddingClientMixin

STUB = """
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
file = Path(words[words.index("--output") + 1])
said = {"words": words, "pid": os.getpid(), "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}
file.with_suffix(".tmp").write_text(json.dumps(said))
file.with_suffix(".tmp").rename(file.with_suffix(".json"))
how = file.parent.parent / "how"
if (how / "crash").exists():
    print("loading"); print("no such model: x\\n"); sys.exit(9)
while (how / "wait").exists():
    time.sleep(0.01)
file.write_text("drawn")
"""


class Training:
    """A store that is recorded to, and a command in place of the real one that does as told."""

    def __init__(self, folder: Path) -> None:
        self.store, self.folder, self.how = folder / "s.zarr", folder / "previews", folder / "how"
        self.how.mkdir()
        (folder / "stub.py").write_text(STUB)
        self.command = (sys.executable, str(folder / "stub.py"))
        EmbeddingStore.create(self.store, SMALL)

    def recorder(self, **options) -> Recorder:
        preview = Preview(command=self.command, **options.pop("preview", {}))
        return Recorder(self.store, preview=preview, **options)

    def told(self, round: int) -> dict:
        """Wait until the preview of a round has begun, and return what it was told."""
        file = self.folder / f"round_{round}.json"
        until(file.exists)
        return json.loads(file.read_text())

    def until_done(self, round: int) -> None:
        until((self.folder / f"round_{round}.png").exists)


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path)


def record(recorder: Recorder, round: int, node: str | int | None = 0) -> None:
    """Record two samples of `node`, or of two nodes as one commit."""
    with recorder.record(node=node, round=round) as batch:
        own: list[dict[str, Any]] = [{"node": 1}, {"node": "server"}]
        for each in [{}] if node is not None else own:
            batch.add(split="train", class_name=["dog", "cat"], index=[0, 0], **values(2), **each)


def gone(pid: int) -> bool:
    """Whether a process has ended and was waited for."""
    return not psutil.pid_exists(pid)


def test_one_preview_of_a_round_begins_with_its_first_commit(training, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with training.recorder() as recorder:
        for round in (5, 10):
            for node in (3, "server"):
                record(recorder, round, node)
                recorder.flush()
            training.until_done(round)
    said = [training.told(round) for round in (5, 10)]
    assert len(list(training.folder.glob("*.json"))) == 2
    for round, each in zip((5, 10), said, strict=True):
        shown = ["--round", str(round), "--node", "3", "--records", "3", "--device", "cpu"]
        picture = ["--output", str(training.folder / f"round_{round}.png")]
        assert each["words"] == [
            *("--store", str(training.store), "preview"),
            *shown,
            *picture,
            *("--while-stdin", "--quiet"),
        ]
        assert each["cuda"] == ""
        until(partial(gone, each["pid"]))  # waited for: no zombie


def test_options_reach_the_command_and_a_card_is_used_only_where_it_is_asked_for(
    training, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    asked = {"device": "cuda:1", "model": "tiny", "steps": 2, "size": 64, "log": "wandb:p"}
    with training.recorder(preview={**asked, "node": "server", "records": 1}) as recorder:
        record(recorder, 5, 0)  # not the node that is asked for
        record(recorder, 5, "server")
        recorder.flush()
        training.until_done(5)
        until(lambda: gone(training.told(5)["pid"]))
        record(recorder, 10, None)  # a whole round as one commit
    assert "--round 10 --node server" in " ".join(training.told(10)["words"])
    said = training.told(5)
    words = " ".join(said["words"])
    assert "--round 5 --node server --records 1 --device cuda:1 --model tiny --steps 2" in words
    assert "--size 64 --log wandb:p" in words
    assert said["cuda"] == "0,1"
    training.until_done(10)


def test_training_goes_on_while_a_preview_is_slow(training, caplog):
    (training.how / "wait").touch()
    with training.recorder() as recorder:
        record(recorder, 1)
        pid = training.told(1)["pid"]
        for round in (2, 3):
            for node in (0, 1):
                record(recorder, round, node)
    # Closed, and it still runs.
    assert psutil.Process(pid).is_running()
    assert not (training.folder / "round_1.png").exists()
    assert len(EmbeddingStore.open(training.store)) == 10
    left_out = [each.getMessage() for each in caplog.records]
    assert left_out == [
        f"{training.store}: the preview of round {n} is left out: that of round 1 is not done yet"
        for n in (2, 3)
    ]
    (training.how / "wait").unlink()
    training.until_done(1)
    until(lambda: gone(pid))
    with training.recorder() as recorder:  # another one, of the same store
        record(recorder, 4)
    training.until_done(4)


def test_a_preview_that_fails_is_a_line_in_the_log(training, caplog):
    (training.how / "crash").touch()
    with training.recorder(on_error="raise") as recorder:
        record(recorder, 1)
        until(lambda: caplog.records)
        record(recorder, 2)
        until(lambda: len(caplog.records) == 2)
    said = [each.getMessage() for each in caplog.records]
    log = training.folder / "preview.log"
    assert said == [
        f"no preview of round {n} (exit code 9): no such model: x; see {log}" for n in (1, 2)
    ]
    assert recorder.missing == ()
    assert len(EmbeddingStore.open(training.store)) == 4


def test_a_command_that_is_not_there_and_a_folder_that_cannot_be_made(training, caplog):
    training.command = ("/no/such/command",)
    with training.recorder() as recorder:
        record(recorder, 1)
    training.folder.joinpath("preview.log").unlink()
    training.folder.rmdir()
    training.folder.touch()
    with training.recorder() as recorder:
        record(recorder, 2)
    first, second = (each.getMessage() for each in caplog.records)
    assert first.startswith(f"{training.store}: no preview of round 1: ")
    assert "/no/such/command" in first
    assert second.startswith(f"{training.store}: no preview of round 2: ")
    assert len(EmbeddingStore.open(training.store)) == 4


TRAINER = """
import os, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_previews import Training, record
from processes import until
training = Training(Path({folder!r}))
(training.how / "wait").touch()
recorder = training.recorder()
record(recorder, 1)
recorder.close()
pid = training.told(1)["pid"]
child = os.fork()  # as loaders do; it ends as an interpreter does
if child == 0:
    sys.exit()
os.waitpid(child, 0)
os.kill(pid, 0)  # is there
print(pid, flush=True)
"""


@pytest.mark.kill
@pytest.mark.slow
def test_no_preview_outlives_the_training_and_a_fork_leaves_it_alone(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINER.format(path=sys.path, folder=str(tmp_path)))
    done = finished([sys.executable, "-W", "ignore::DeprecationWarning", str(script)])
    assert "the preview of round 1 is ended with the training" in done.stderr
    until(lambda: gone(int(done.stdout)))
    assert not (tmp_path / "previews" / "round_1.png").exists()


@pytest.mark.kill
@pytest.mark.slow
def test_a_preview_whose_trainer_was_killed_ends_by_itself(training):
    """The real command, whose standard input was the trainer's pipe."""
    command = [sys.executable, "-m", "fedgfe_store", "--store", training.store, "preview"]
    with started([*command, "--while-stdin"], stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() != 0
    assert not training.folder.exists()


@pytest.mark.parametrize("wrong", [-1, True, "3", 1.5])
def test_what_is_no_number_of_records_is_refused(tmp_path, wrong):
    with pytest.raises(SchemaMismatchError, match="preview"):
        Recorder(tmp_path / "s.zarr", preview=wrong)
    Recorder(tmp_path / "s.zarr", preview=0).close()


@pytest.mark.parametrize("name", ["records", "steps", "size"])
def test_numbers_of_a_preview_begin_with_1(name):
    with pytest.raises(SchemaMismatchError, match=rf"preview\.{name}: expected at least 1, got 0"):
        replace(Preview(), **dict[str, Any]({name: 0}))


def test_a_model_has_to_be_named(store, monkeypatch):
    monkeypatch.delenv("FEDGFE_MODEL", raising=False)
    fill(store, node=0, round=1)
    done = CliRunner().invoke(group, ["preview", "--store", str(store.path)])
    assert done.exit_code == 1
    assert done.output == (
        "error: no model is named: --model or $FEDGFE_MODEL says which one to preview with\n"
    )


@pytest.mark.long
@pytest.mark.model
def test_the_mixins_show_what_generate_would(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "fedgfe_store")

    class Client(EmbeddingClientMixin):
        id = 0
        embedding_preview = Preview(
            records=2, model="tiny", steps=2, log=f"tensorboard:{tmp_path / 'runs'}"
        )

        def iter_embeddings(self, split):
            t5, clip = legacy.tensors(4)
            names = ["dog", "dog", "drum", "cat"]
            yield {"class_name": names, "t5": t5, "clip": clip}

    store = Client().save_embeddings_to_checkpoint(split="train", round_num=5)
    sheet = store.parent / "previews" / "round_5.png"
    until(lambda: any("preview of round 5" in each.getMessage() for each in caplog.records))
    assert caplog.records[-1].getMessage() == f"preview of round 5: {sheet}"
    pictures = store.parent / "previews" / "images"
    wanted = ["node_0_train_cat_0_r5.png", "node_0_train_dog_0_r5.png"]
    assert sorted(path.name for path in pictures.glob("*.png")) == wanted
    words = ["--round", "5", "--class", "cat,dog", "--per-class", "1", "--steps", "2"]
    done = CliRunner().invoke(group, ["generate", *words, "--model", "tiny", "--output-dir", "own"])
    assert done.exit_code == 0, done.output
    for name in wanted:
        with Image.open(pictures / name) as shown, Image.open(Path("own") / name) as own:
            difference = np.asarray(shown).astype(int) - np.asarray(own)
            assert np.abs(difference).max() <= 1  # of another batch
    assert sheet.stat().st_size < 200_000
    until(lambda: Path("runs").exists() and tensorboard(Path("runs")).Tags()["images"])
    (event,) = tensorboard(Path("runs")).Images("sheet")
    assert event.step == 5
    with Image.open(io.BytesIO(event.encoded_image_string)) as logged, Image.open(sheet) as drawn:
        assert np.array_equal(np.asarray(logged), np.asarray(drawn.convert("RGB")))
