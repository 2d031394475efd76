"""A node: trains the adapter on its own sounds, and sends embeddings along where they are due."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedgfe_store.demo.adapters import Adapter
from fedgfe_store.demo.federation import NODES, embed, train, training_clips
from fedgfe_store.recording.flower import is_due, pack

app = ClientApp()


@app.train()
def train_node(message: Message, context: Context) -> Message:
    """Train once over the node's clips."""
    clips = training_clips(NODES[int(context.node_config["partition-id"])])
    adapter = Adapter()
    adapter.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config = message.content["config"]
    number = int(config["rounds-before"]) + int(config["server-round"])
    loss = train(adapter, clips, seed=number)
    content = RecordDict(
        {
            "arrays": ArrayRecord(adapter.state_dict()),
            "metrics": MetricRecord({"loss": loss, "num-examples": len(clips)}),
        }
    )
    if is_due(message):
        heard = clips.first(2)
        t5, clip = embed(adapter, heard)
        names = {"split": "train", "class_name": heard.class_names, "index": heard.index}
        content.update(pack(context, {**names, "t5": t5, "clip": clip}))
    return Message(content, reply_to=message)
