"""The server: averages, records, and goes on from the last round that it saved."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedgfe_store import Metadata
from fedgfe_store.demo.adapters import Adapter
from fedgfe_store.demo.federation import NODES, embed, evaluate, held_out_clips, new_adapter
from fedgfe_store.recording import Recorder
from fedgfe_store.recording.flower import RecordingMixin

app = ServerApp()


class Strategy(RecordingMixin, FedAvg):
    """FedAvg that records."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that are missing."""
    config = context.run_config
    folder = Path(str(config["folder"]))
    folder.mkdir(parents=True, exist_ok=True)
    saved, clips = folder / "server.pt", held_out_clips()
    state = {"round": 0, "adapter": new_adapter(0).state_dict()}
    if saved.exists():
        state = torch.load(saved)
    done = state["round"]

    def server_embeddings(number: int, arrays: ArrayRecord) -> dict:
        heard = clips.first(3)
        t5, clip = embed(adapter_of(arrays), heard)
        names = {"split": "test", "class_name": heard.class_names, "index": heard.index}
        return {**names, "t5": t5, "clip": clip}

    def judge(number: int, arrays: ArrayRecord) -> MetricRecord:
        loss, told = evaluate(adapter_of(arrays), clips)
        if number:
            recorder.flush()  # first: what is saved here is never of a round that is not recorded
            state = {"round": done + number, "adapter": arrays.to_torch_state_dict()}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            print(f"round {done + number}: test loss {loss:.3f}, told {told:.0%}", flush=True)
        return MetricRecord({"loss": loss, "told": told})

    metadata = Metadata(experiment="flower demo")
    every = int(config["record-every"])
    with Recorder(folder / "embeddings.zarr", every=every, metadata=metadata) as recorder:
        strategy = Strategy(
            recorder=recorder,
            server_embeddings=server_embeddings,
            rounds_before=done,
            fraction_evaluate=0.0,
            min_train_nodes=len(NODES),
            min_available_nodes=len(NODES),
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(state["adapter"]),
            train_config=ConfigRecord({"rounds-before": done}),
            num_rounds=int(config["rounds"]) - done,
            evaluate_fn=judge,
        )


def adapter_of(arrays: ArrayRecord) -> Adapter:
    """Return the adapter with these parameters."""
    adapter = Adapter()
    adapter.load_state_dict(arrays.to_torch_state_dict())
    return adapter
