"""The demo, as a newcomer runs it: files, pictures that emerge, and a second run."""

from __future__ import annotations

import json
import sys

import numpy as np
from pictures import accuracy, distances
from PIL import Image
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.checkpoints import import_checkpoints
from fedgfe_store.demo.experiment import RECORDED
from fedgfe_store.demo.pictograms import CLASSES

KEY = ["node", "round", "split", "class_name", "index"]


def pictures_of(demo, round_number):
    folder = demo.folder / "output_images" / "demo"
    keys = EmbeddingStore.open(demo.folder / "embeddings.zarr").select(round=round_number).keys()
    where = {k: "server" if k.node == "server" else f"node_{k.node}" for k in keys}
    files = [folder / f"{where[k]}_{k.split}_{k.class_name}_{k.index}_r{k.round}.png" for k in keys]
    return [np.asarray(Image.open(file)) for file in files], [k.class_name for k in keys]


def test_pictures_emerge_over_the_rounds(demo):
    right, far = [], []
    for round_number in RECORDED:
        images, classes = pictures_of(demo, round_number)
        assert len(images) == 120
        right.append(accuracy(images, classes))
        own = [distances(i)[CLASSES.index(c)] for i, c in zip(images, classes, strict=True)]
        far.append(np.mean(own))
    assert far == sorted(far, reverse=True)
    assert right[-1] >= 0.95 > 0.6 > right[0]


def test_its_checkpoints_make_the_same_store(demo, tmp_path):
    import_checkpoints(tmp_path / "imported.zarr", demo.folder / "checkpoints" / "embeddings")
    trained = EmbeddingStore.open(demo.folder / "embeddings.zarr")
    other = EmbeddingStore.open(tmp_path / "imported.zarr")
    tables = [
        s.select().records.set_index(KEY).sort_index()[["t5_digest", "clip_digest", "audio_path"]]
        for s in (trained, other)
    ]
    assert len(tables[0]) == 480
    assert tables[0].equals(tables[1])


def test_the_sheet_shows_classes_by_rounds(demo):
    sheet = Image.open(demo.folder / "contact_sheet.png")
    assert sheet.height > 10 * 96
    assert sheet.width > 4 * 96
    colours = {sheet.getpixel((x, y)) for x in range(sheet.width) for y in (100, 500, 1000)}
    assert len(colours) > 100


def test_the_store_beside_it_generates_as_it_stands(demo):
    command = [sys.executable, "-m", "fedgfe_store.cli.main", "generate", "--round", "5"]
    done = finished(command, cwd=demo.folder)
    assert "model: tiny" in done.stdout
    assert "0 images rendered, 120 were there already: output_images/demo" in done.stdout


def test_a_second_run_finds_everything_done(demo):
    before = (demo.folder / "embeddings.zarr" / "zarr.json").read_bytes()
    command = [sys.executable, "-m", "fedgfe_store.cli.main", "demo"]
    done = finished(command, cwd=demo.folder.parent)
    assert "all its rounds are recorded already" in done.stdout
    assert "0 new records, 480 unchanged" in done.stdout
    assert "480 were there already" in done.stdout
    assert (demo.folder / "embeddings.zarr" / "zarr.json").read_bytes() == before


def test_the_first_run_says_what_it_does(demo):
    for line in (
        "training: three nodes and a server, 20 rounds",
        "loss on held-out sounds",
        "$ fedgfe-store info",
        "$ fedgfe-store import checkpoints/embeddings",
        "16 files",
        "0 new records, 480 unchanged",
        "$ fedgfe-store generate",
        "480 images rendered",
        "contact_sheet.png",
    ):
        assert line in demo.output
    document = json.loads((demo.folder / "embeddings.zarr" / "zarr.json").read_text())
    assert document["attributes"]["fedgfe_store"]["metadata"]["model"] == "tiny"
