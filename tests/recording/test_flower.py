"""Recording in a Flower app, in one process: Flower's classes, a Grid that calls the nodes."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, values
from places import ROOT, TESTS
from processes import finished

pytest.importorskip("flwr", reason="Flower is not installed (the extra flower)")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    Krum,
)
from flwr.supercore.task_identity import TaskIdentity

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.demo import federation
from fedgfe_store.demo.adapters import Adapter
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.recording import Recorder
from fedgfe_store.recording.flower import RecordingMixin, is_due, node_name, pack
from fedgfe_store.schema import TensorColumn

NODES = (0, 1, 2)
LOSS = {"num-examples": 4, "loss": 0.5}


class Nodes(Grid):  # type: ignore[misc]
    """Calls a ClientApp for each of Flower's nodes, and keeps what parameters they answered."""

    def __init__(self, app: ClientApp, nodes: int = len(NODES), **configs: dict) -> None:
        self.app, self.nodes, self.configs = app, nodes, configs
        self.answers: list[dict[int, dict[str, torch.Tensor]]] = []
        # What a process of a run is told when it starts.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def get_node_ids(self) -> Iterable[int]:
        return [1000 + number for number in range(self.nodes)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = [self._reply(message) for message in messages]
        answers = {
            reply.metadata.src_node_id - 1000: reply.content["arrays"].to_torch_state_dict()
            for reply in replies
            if not reply.has_error()
        }
        self.answers.append(answers)
        return replies

    def _reply(self, message: Message) -> Message:
        number = message.metadata.dst_node_id - 1000
        config = self.configs.get(f"node{number}", {"partition-id": number})
        context = Context(1, 1000 + number, config, RecordDict(), {})
        try:
            reply = self.app(message, context)
        except Exception as error:  # noqa: BLE001 - as a SuperNode does
            return Message(Error(2, str(error)), reply_to=message)
        # As it comes out of the wire.
        content = recorddict_from_proto(recorddict_to_proto(reply.content))
        return Message(content, reply_to=message)

    def set_run(self, run) -> None: ...
    def run(self): ...
    def create_message(self, *args): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...


def client(embeddings) -> ClientApp:
    """A node whose parameters say who it is; `embeddings` gives its batches by node and round."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        node, number = node_name(context), int(message.content["config"]["server-round"])
        weight = torch.full((2, 3), float(context.node_id - 1000 + 10 * number))
        arrays = ArrayRecord({"weight": message.content["arrays"]["weight"]})
        if number:
            arrays = ArrayRecord({"weight": weight})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(LOSS)})
        if embeddings is not None and is_due(message):
            content.update(pack(context, embeddings(node, number)))
        return Message(content, reply_to=message)

    return app


def drawn(node: str, number: int, n: int = 4, schema: Schema = SMALL) -> dict:
    """Two classes of a node in a round, whose values follow from both."""
    seed = (1 + int(node) if node.isdecimal() else 9) * 100 + number
    names = ["dog"] * (n // 2) + ["drum"] * (n - n // 2)
    return {"split": "train", "class_name": names} | values(n, seed, schema)


def recording(base: type) -> type:
    return type("Recording", (RecordingMixin, base), {})


def start(strategy, grid: Grid, rounds: int = 2):
    first = ArrayRecord({"weight": torch.zeros(2, 3)})
    random.seed(0)  # from which Flower draws nodes, and so their order
    return strategy.start(grid=grid, initial_arrays=first, num_rounds=rounds)


def run(
    path: Path,
    app: ClientApp,
    *,
    rounds: int = 2,
    every: int = 1,
    nodes: dict | None = None,
    **options,
):
    grid = Nodes(app, **(nodes or {}))
    with Recorder(path, every=every) as recorder:
        strategy = recording(FedAvg)(recorder=recorder, fraction_evaluate=0.0, **options)
        return start(strategy, grid, rounds)


def check_drawn(selection, node: str, number: int) -> None:
    rows = selection.take((selection.records.node == node) & (selection.records["round"] == number))
    expected = drawn(node, number)
    records = rows.records
    assert list(records.class_name) == expected["class_name"]
    assert list(records["index"]) == [0, 1, 0, 1]
    for column in ("t5", "clip"):
        np.testing.assert_array_equal(rows.read(column), expected[column])


def of_server(number: int, arrays: ArrayRecord) -> dict:
    assert set(arrays) == {"weight"}
    return drawn("server", number)


def test_each_node_and_the_server_are_recorded_a_commit_a_round(store):
    run(store.path, client(drawn), server_embeddings=of_server, rounds=3)
    store = EmbeddingStore.open(store.path)
    found = store.select()
    assert len(found) == 3 * 4 * 4
    for number in (1, 2, 3):
        for node in ("0", "1", "2", "server"):
            check_drawn(found, node, number)
    assert store.commit == 3, "one commit a round"
    assert store.history()["nodes"].tolist() == [("0", "1", "2", "server")] * 3
    assert store.verify().sound


class Private(DifferentialPrivacyServerSideFixedClipping):  # type: ignore[misc]
    """One that looks at the replies before the strategy in it does."""

    def __init__(self, **options) -> None:
        super().__init__(
            FedAvg(**options), noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=3
        )


@pytest.mark.parametrize("base", [FedAvg, FedAdam, FedMedian, FedProx, Krum, Private])
def test_a_strategy_makes_the_same_of_parameters_as_without(store, base):
    options = {"fraction_evaluate": 0.0}
    if base is FedProx:
        options["proximal_mu"] = 0.1
    plain = start(base(**options), Nodes(client(None)))
    with Recorder(store.path) as recorder:
        strategy = recording(base)(recorder=recorder, **options)
        recorded = start(strategy, Nodes(client(drawn)))
    np.testing.assert_array_equal(recorded.arrays["weight"].numpy(), plain.arrays["weight"].numpy())
    assert recorded.train_metrics_clientapp == plain.train_metrics_clientapp
    assert len(EmbeddingStore.open(store.path).select()) == 2 * 3 * 4


def test_rounds_that_are_due(store, caplog):
    asked = []

    def embeddings(node, number):
        asked.append(number)
        return drawn(node, number)

    run(store.path, client(embeddings), rounds=5, every=2, server_embeddings=of_server)
    assert sorted(set(asked)) == [2, 4]
    assert set(EmbeddingStore.open(store.path).select().records["round"]) == {2, 4}


def test_what_comes_unasked_is_taken_out_and_not_recorded(store, caplog):
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"weight": torch.ones(2, 3)})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(LOSS)})
        content.update(pack(context, drawn(node_name(context), 1)))
        return Message(content, reply_to=message)

    result = run(store.path, app, rounds=1, every=2)
    assert set(result.arrays) == {"weight"}
    assert EmbeddingStore.open(store.path).commit == 0
    assert "round 1 is not due: the embeddings of replies are left" in caplog.messages


def test_rounds_go_on_from_an_earlier_run(store):
    run(store.path, client(drawn), rounds=2)
    run(store.path, client(drawn), rounds=1, rounds_before=2)
    found = EmbeddingStore.open(store.path).select()
    assert sorted(set(found.records["round"])) == [1, 2, 3]


def test_a_node_that_fails_leaves_the_others_recorded(store):
    def embeddings(node, number):
        if node == "1" and number == 2:
            raise MemoryError
        return drawn(node, number)

    run(store.path, client(embeddings))
    records = EmbeddingStore.open(store.path).select().records
    assert records.groupby(["round", "node"]).size().to_dict() == {
        (1, "0"): 4, (1, "1"): 4, (1, "2"): 4, (2, "0"): 4, (2, "2"): 4
    }  # fmt: skip


def test_all_that_is_known_of_records_travels(tmp_path):
    moment = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    t5 = torch.randn(2, 17, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    known = {
        "index": torch.tensor([7, 3]),
        "sample_id": ["a", None],
        "file_id": ("x.wav", "y.wav"),
        "audio_path": "sounds/dog.wav",
        "image_filename": ["one.png", "two.png"],
        "timestamp": [moment, datetime(2026, 3, 2)],
        "extra": [{"gain": 0.5, "tags": ["a"]}, None],
    }
    rows = [
        {"split": "val", "class_name": "dog", "t5": t5, "clip": np.ones((2, 768), "f4"), **known},
        {
            "split": "train",
            "class_name": pd.Series(["cat"]),
            "index": [np.int64(5)],
            "timestamp": np.datetime64("2026-03-03T01", "ns"),
            "t5": t5[0],
            "clip": torch.zeros(768),
        },
    ]
    run(tmp_path / "new.zarr", client(lambda node, number: rows), rounds=1)
    found = EmbeddingStore.open(tmp_path / "new.zarr").select(node="2", split="val")
    records = found.records.set_index("index").loc[[7, 3]]
    assert records.sample_id.tolist() == ["a", ""]
    assert records.file_id.tolist() == ["x.wav", "y.wav"]
    assert records.audio_path.tolist() == ["sounds/dog.wav"] * 2
    assert records.image_filename.tolist() == ["one.png", "two.png"]
    assert [each.isoformat()[:16] for each in records.timestamp] == [
        "2026-03-01T12:30", "2026-03-02T00:00"
    ]  # fmt: skip
    assert json.loads(records.extra.tolist()[0]) == {"gain": 0.5, "tags": ["a"]}
    np.testing.assert_array_equal(found.read("t5"), t5.float().numpy())
    other = EmbeddingStore.open(tmp_path / "new.zarr").select(node="2", split="train")
    np.testing.assert_array_equal(other.read("t5"), t5[:1].float().numpy())
    assert other.records["index"].tolist() == [5]
    assert other.records.timestamp.iloc[0].isoformat()[:16] == "2026-03-03T01:00"


def test_bfloat16_travels_as_it_is_in_half_the_bytes(tmp_path):
    t5 = torch.randn(2, 17, 4096, generator=torch.Generator().manual_seed(1))
    given = {"t5": t5, "clip": t5[:, 0, :768]}
    both = [given, {name: tensor.bfloat16() for name, tensor in given.items()}]
    sizes = []
    for name, tensors in zip(("rounded", "sent"), both, strict=True):
        row = {"split": "train", "class_name": "dog", **tensors}
        sizes.append(sum(len(a.data) for a in pack(0, row)["fedgfe.tensors"].values()))
        with Recorder(tmp_path / f"{name}.zarr", precision="bfloat16") as recorder:
            strategy = recording(FedAvg)(recorder=recorder, fraction_evaluate=0.0)
            start(strategy, Nodes(client(lambda node, number, row=row: row)), 1)
    assert sizes[1] < 0.51 * sizes[0]
    rounded = EmbeddingStore.open(tmp_path / "rounded.zarr").select()
    sent = EmbeddingStore.open(tmp_path / "sent.zarr").select()
    np.testing.assert_array_equal(sent.read("t5"), rounded.read("t5"))
    np.testing.assert_array_equal(sent.read("t5")[:2], t5.bfloat16().float().numpy())


def test_masks_and_ragged_columns_travel(tmp_path):
    schema = Schema.of(
        "custom",
        TensorColumn("embeds", (6, 8), ("token", "feature"), ragged=True),
        TensorColumn("mask", (6,), ("token",), dtype="bool"),
        pooled=(5,),
    )
    store = EmbeddingStore.create(tmp_path / "custom.zarr", schema)
    long = [torch.randn(2, 8), torch.randn(6, 8).bfloat16()]
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    row = {"split": "train", "class_name": ["dog", "cat"], "embeds": long, "mask": mask}
    pooled = torch.randn(2, 5).half()
    row["pooled"] = pooled
    run(store.path, client(lambda node, number: row), rounds=1, nodes={"nodes": 2})
    found = EmbeddingStore.open(store.path).select(node=1)
    assert found.read("length_embeds").tolist() == [2, 6]
    np.testing.assert_array_equal(found.read("embeds")[0, :2], long[0].numpy())
    np.testing.assert_array_equal(found.read("embeds")[1], long[1].float().numpy())
    np.testing.assert_array_equal(found.read("mask"), mask.numpy())
    np.testing.assert_array_equal(found.read("pooled"), pooled.float().numpy())


# names


def test_names_of_nodes(store):
    named = {
        "node0": {"node": "rome", "partition-id": 0},
        "node1": {"partition-id": 5},
        "node2": {},
    }
    run(store.path, client(drawn), rounds=1, nodes=named)
    assert set(EmbeddingStore.open(store.path).select().records.node) == {"rome", "5", "1002"}


def test_two_nodes_of_one_name_are_refused_and_nothing_is_recorded(store):
    same = {"node2": {"partition-id": 1}}
    said = (
        "round 1, reply of Flower's node 100[12]: expected a name of its own, got '1' as node 100"
    )
    with pytest.raises(SchemaMismatchError, match=said):
        run(store.path, client(drawn), rounds=1, nodes=same)
    assert EmbeddingStore.open(store.path).commit == 0


@pytest.mark.parametrize("name", ["server", "text"])
def test_no_client_is_the_server(name):
    with pytest.raises(SchemaMismatchError, match=f"expected a client's name, got '{name}'"):
        pack(name, drawn("0", 1))


# what does not fit


def test_more_than_a_reply_may_carry_is_refused_with_what_to_do():
    row = drawn("0", 1)
    nbytes = 4 * (3 * 8 + 4) * 4
    pack(0, [row, row], limit=2 * nbytes)
    with pytest.raises(SchemaMismatchError) as caught:
        pack(0, [row, row], limit=2 * nbytes - 1)
    said = str(caught.value)
    assert said.startswith("node 0: expected at most 895 B of embeddings in a reply, got 896 B: ")
    for remedy in ("bfloat16", "fewer tokens", "merge the stores"):
        assert remedy in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clas_name": "dog"}, "clas_name is a str, not a tensor"),
        ({"t5": torch.zeros(2, 2, dtype=torch.complex64)}, "t5 is not an ordinary tensor"),
        ({"extra": {"a": object()}}, "extra: .* cannot be kept as JSON"),
        ({"extra": {"a": float("nan")}}, "extra: .* cannot be kept as JSON"),
        ({"class_name": None}, "expected a value for class_name, got None"),
        ({"index": [0, 1, 2]}, "index: expected 4 values, one per record, got 3"),
        ({"index": -1}, "index: expected a whole number from 0"),
        ({"timestamp": "yesterday"}, "timestamp: expected a datetime, got 'yesterday'"),
        ({"t5": []}, "t5: expected sequences"),
        ({"t5": [torch.zeros(2, 8), torch.zeros(2, 9)]}, r"t5: .* got \[\[2, 8\], \[2, 9\]\]"),
    ],
)
def test_what_cannot_travel_is_refused_at_the_node(change, said):
    with pytest.raises(SchemaMismatchError, match=said):
        pack(0, drawn("0", 1) | change)


def test_what_does_not_fit_the_store_names_the_node(store):
    def embeddings(node, number):
        wrong = {"t5": np.zeros((4, 2, 8), np.float32)} if node == "1" else {}
        return drawn(node, number) | wrong

    said = r"reply of Flower's node 1001 \(1\): t5: expected"
    with pytest.raises(SchemaMismatchError, match=said):
        run(store.path, client(embeddings))
    assert EmbeddingStore.open(store.path).commit == 0


def test_another_release_at_a_node_is_told(store):
    def other(message: Message, context: Context) -> Message:
        reply = client(drawn)(message, context)
        record = reply.content["fedgfe.records"]
        told = json.loads(record["records"]) | {"form": 2}
        reply.content["fedgfe.records"] = ConfigRecord({"records": json.dumps(told)})
        return reply

    with pytest.raises(SchemaMismatchError, match="another release of fedgfe-store"):
        run(store.path, other)


def test_without_flower_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    name = "fedgfe_store.recording.flower"
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(NotFoundError, match=r"needs flwr: pip install 'fedgfe-store\[flower\]'"):
        importlib.import_module(name)


# a server that is killed


def rounds_of(path: Path) -> dict:
    records = EmbeddingStore.open(path).select().records
    return records.groupby("round").size().to_dict()


def kill_at(path: Path, step: int) -> None:
    """Kill this process as it opens its `step`-th file of the store for writing."""
    left = step

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event != "open" or isinstance(arguments[0], int) or not arguments[2] & os.O_CREAT:
            return
        if os.fsdecode(arguments[0]).startswith(str(path)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kills(path: Path, every: int) -> None:
    """Kill servers at each file that they make, start them again, print what is found."""
    importlib.import_module("pandas")  # here, not in each of the forks
    for step in range(0, 1000, every):
        store = EmbeddingStore.create(path / f"{step}.zarr", SMALL)
        server = os.fork()
        if not server:
            kill_at(store.path, step)
            run(store.path, client(drawn), server_embeddings=of_server, rounds=3)
            os._exit(0)
        killed = os.waitpid(server, 0)[1] != 0
        again = os.fork()
        if not again:
            found = rounds_of(store.path)
            run(store.path, client(drawn), server_embeddings=of_server, rounds=3)
            sound = EmbeddingStore.open(store.path).verify().sound
            print(json.dumps([found, rounds_of(store.path), sound]), flush=True)
            os._exit(0)
        assert os.waitpid(again, 0)[1] == 0
        if not killed:
            return


CODE = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_flower
test_flower.kills(Path(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize("every", ["35", pytest.param("1", marks=pytest.mark.long)])
def test_a_killed_server_leaves_every_round_whole_and_the_next_goes_on(tmp_path, every):
    command = [sys.executable, "-c", CODE, tmp_path, every, TESTS, TESTS / "recording"]
    lines = [line for line in finished(command).stdout.splitlines() if line.startswith("[{")]
    assert len(lines) > 4
    counts = set()
    for found, after, sound in map(json.loads, lines):
        assert set(found.values()) <= {4 * 4}, "a round is there whole or not at all"
        assert list(found) == ["1", "2", "3"][: len(found)]
        assert after == {"1": 16, "2": 16, "3": 16}
        assert sound
        counts.add(len(found))
    assert counts >= {0, 1, 3}


# the example


def example(part: str):
    """The example's app of a node or of the server."""
    folder = str(ROOT / "examples" / "flower")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"fedgfe_flower.{part}").app


def run_example(folder: Path, rounds: int) -> Nodes:
    grid = Nodes(example("client_app"))
    config = {"folder": str(folder), "rounds": rounds, "record-every": 1}
    example("server_app")(grid, Context(1, 1, {}, RecordDict(), config))
    return grid


@pytest.mark.long
def test_the_example_records_what_its_nodes_and_server_make_of_sounds(tmp_path):
    """The oracle: the parameters that the nodes sent, and the same sounds."""
    grid = run_example(tmp_path, 1)
    found = EmbeddingStore.open(tmp_path / "embeddings.zarr").select(round=1)
    assert len(found) == 3 * 2 * 10 + 3 * 10
    weights, parameters = [], []
    for number, node in enumerate(federation.NODES):
        clips = federation.training_clips(node)
        weights.append(len(clips))
        parameters.append(grid.answers[0][number])
        check_embedded(found, node, parameters[-1], clips.first(2))
    average = federation.average(parameters, weights)
    check_embedded(found, "server", average, federation.held_out_clips().first(3), rtol=1e-3)


def check_embedded(found, node: str, parameters, clips: federation.Clips, rtol: float = 0) -> None:
    adapter = Adapter()
    adapter.load_state_dict(parameters)
    t5, clip = federation.embed(adapter, clips)
    rows = found.take(found.records.node == node)
    assert list(rows.records.class_name) == clips.class_names
    assert list(rows.records["index"]) == clips.index.tolist()
    np.testing.assert_allclose(rows.read("t5"), t5.numpy(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(rows.read("clip"), clip.numpy(), rtol=rtol, atol=rtol)
