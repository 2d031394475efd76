"""Ray: every image once, whatever becomes of workers, as one process makes it; and a dataset."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from conftest import fill
from PIL import Image

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.cli.main import group
from fedgfe_store.errors import FedgfeStoreError, NotFoundError, SchemaMismatchError
from fedgfe_store.generation import ray as on_ray
from fedgfe_store.generation.crew import Foreman, prepared
from fedgfe_store.generation.prepare import prepare
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.run import generate
from fedgfe_store.generation.stopping import Stop
from fedgfe_store.images.manifest import read_manifest
from fedgfe_store.models.model import Model
from fedgfe_store.names import image_name
from fedgfe_store.schema import TensorColumn

# What Ray's own modules call in one another.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray\\.")
REQUEST = Request(model="tiny", device="cpu", steps=2, batch_size=2)
WIDE = Schema.flux(3, width=4096, clip=(768,))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What the tiny FLUX takes: 24 records."""
    store = EmbeddingStore.create(tmp_path_factory.mktemp("s") / "s.zarr", WIDE)
    fill(store, node=0, round=1, n=12)
    return store


@pytest.fixture(scope="module")
def cluster():
    """Two processors of this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Else Ray leaves one in the home folder.
        patch.setenv("RAY_AUTH_TOKEN", uuid4().hex)
        # What these tests define is known to workers.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ray.init(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def kill_a_worker() -> None:
    """Kill one of the processes that render."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # others of Ray's come and go
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                process.kill()
                return
    raise AssertionError("no worker is there")


@pytest.mark.long
@pytest.mark.kill
@pytest.mark.model
def test_every_image_is_made_once_through_a_stop_and_a_kill(store, cluster, tmp_path):
    folder, stop, remarks = tmp_path / "out", Stop(), list[str]()
    run = on_ray.prepare(store.select(), folder, REQUEST, report=remarks.append)
    settled: list[int] = []

    def stop_now(images: int) -> None:
        settled.append(images)
        stop.request("SIGUSR1")

    first = on_ray.render(run, workers=1, stop=stop, progress=stop_now, report=remarks.append)
    assert (first.stopped, first.stuck, first.failed) == ("SIGUSR1", False, ())
    assert 0 < first.done == sum(settled) == len(list(folder.glob("*.png"))) < len(store)

    run = on_ray.prepare(store.select(), folder, REQUEST, report=remarks.append)
    killed: list[int] = []

    def kill_once(images: int) -> None:
        if not killed:
            kill_a_worker()
        killed.append(images)

    second = on_ray.render(run, workers=2, progress=kill_once, report=remarks.append)
    assert (second.failed, second.left, second.stopped) == ((), 0, None)
    assert second.done + second.elsewhere == len(store) - first.done
    check_whole(store, folder)

    arguments = ["--model", "tiny", "--device", "cpu", "--steps", "2", "--engine", "ray"]
    program = ["--store", str(store.path), "generate", *arguments, "--output-dir", str(folder)]
    result = CliRunner().invoke(group, program)
    assert result.exit_code == 0, result.output
    assert "0 images rendered, 24 were there already" in result.output


def check_whole(store: EmbeddingStore, folder: Path) -> None:
    """Compare with what one process makes, and see that each image is listed once."""
    alone = folder.parent / "alone"
    assert generate(store.select(), alone, REQUEST).done == len(store)
    names = sorted(image_name(key) for key in store.select().keys())
    assert sorted(path.name for path in folder.glob("*.png")) == names
    for name in names:
        with Image.open(folder / name) as one, Image.open(alone / name) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))
            assert one.info == other.info
    assert Counter(line["file"] for line in read_manifest(folder)) == dict.fromkeys(names, 1)


class Deadly(Model):
    """A model over which its process is killed while it is loaded, as where memory is short."""

    def fetch_weights(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.kill
@pytest.mark.model
def test_workers_that_cannot_be_made_end_the_run(store, cluster, tmp_path):
    run = on_ray.prepare(store.select(), tmp_path / "out", REQUEST)
    facts = {field.name: getattr(run.model, field.name) for field in fields(run.model)}
    with pytest.raises(FedgfeStoreError, match="died 4 times while they loaded the model"):
        on_ray.render(replace(run, model=Deadly(**facts)), workers=1)
    gone = replace(run, model=replace(run.model, folder=tmp_path / "gone"))
    with pytest.raises(NotFoundError, match="gone") as caught:
        on_ray.render(gone, workers=1)
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.long
def test_a_dataset_of_ray_has_the_records(store, cluster, monkeypatch, tmp_path):
    monkeypatch.setattr("fedgfe_store.readers.ray._BLOCK_BYTES", 10 * WIDE.record_nbytes)
    selection = store.select(class_name="dog")
    rows = sorted(selection.to_ray().iter_rows(), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(12))
    assert {(row["node"], row["round"], row["class_name"]) for row in rows} == {("0", 1, "dog")}
    for name in ("t5", "clip"):
        assert np.array_equal(np.stack([row[name] for row in rows]), selection.read(name))
    one = selection.to_ray(columns=["clip"])
    assert set(one.schema().names) == {*(["node", "round", "split", "class_name", "index"]), "clip"}

    ragged = EmbeddingStore.create(
        tmp_path / "r.zarr",
        Schema.of("x", TensorColumn("e", (4, 2), ("token", "feature"), ragged=True)),
    )
    with ragged.append(node=0, round=1) as batch:
        batch.add(
            split="a",
            class_name="b",
            index=[0, 1],
            e=[np.ones((1, 2), np.float32), np.ones((3, 2), np.float32)],
        )
    lengths = {row["index"]: row["length_e"] for row in ragged.select().to_ray().iter_rows()}
    assert lengths == {0: 1, 1: 3}


def test_unknown_columns_are_refused(store):
    with pytest.raises(SchemaMismatchError, match="t6"):
        store.select().to_ray(columns=["t6"])
    with pytest.raises(SchemaMismatchError, match="columns: expected a list of names"):
        store.select().to_ray(columns="t5")


def test_without_ray_it_says_what_to_install(store, monkeypatch, tmp_path):
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotFoundError, match=r"needs ray: pip install 'fedgfe-store\[ray\]'"):
        store.select().to_ray()
    program = ["--store", str(store.path), "generate", "--engine", "ray"]
    result = CliRunner().invoke(group, [*program, "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "error: a run on Ray needs ray: pip install 'fedgfe-store[ray]'"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--workers", "2"], "--workers goes with --engine ray"),
        (["--engine", "ray", "--from-image", "x.png"], "--engine ray goes with many images"),
    ],
)
def test_options_that_do_not_go_together(store, options, error):
    result = CliRunner().invoke(group, ["--store", str(store.path), "generate", *options])
    assert result.exit_code == 2
    assert error in result.output


@pytest.mark.parametrize(
    ("nodes", "asked", "crew"),
    [
        ([{"CPU": 8.0}], None, (1, 0, 8, 1)),
        ([{"CPU": 8.0}], 4, (4, 0, 2, 4)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], None, (2, 0, 4, 1)),
        ([{"CPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}], None, (6, 1, 1, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 2, (2, 1, 1, 2)),
    ],
)
def test_workers_are_as_many_as_gpus_or_machines(nodes, asked, crew):
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    ray: Any = SimpleNamespace(nodes=lambda: [*alive, dead])
    found = on_ray.Crew.of(ray, asked)
    assert (found.workers, found.gpus, found.cpus, found.neighbours) == crew


def test_a_run_is_planned_elsewhere_as_it_is_here(store, tmp_path, monkeypatch):
    request = replace(REQUEST, offload="model")  # which is ignored on the CPU, and said so
    here = prepare(store.select(), tmp_path, request, report=lambda remark: None)
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps((store.select(), tmp_path, request, {}))
    run, _, error = pickle.loads(prepared(os.getcwd(), sent))
    assert error is None
    assert (run.plan, run.batch_size, run.model) == (here.plan, here.batch_size, here.model)
    gone = pickle.dumps((store.select(round=99), tmp_path, request, {}))
    _, _, error = pickle.loads(prepared(os.getcwd(), gone))
    assert isinstance(error, NotFoundError)
    assert str(error) == "selection: expected at least one record, got none"
    _, _, error = pickle.loads(prepared("/nowhere", sent))
    assert "/nowhere: expected on all machines" in str(error)


def test_tries_of_a_part_are_counted():
    foreman = Foreman()
    assert [foreman.begin(0), foreman.begin(4), foreman.begin(0)] == [1, 1, 2]
    foreman.finish(0)
    assert [foreman.begin(0), foreman.begin(4)] == [1, 2]
