"""The demo's federation: what adapters hear, how the server averages, and that they learn."""

from __future__ import annotations

import os
import sys
import wave
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import accuracy
from processes import finished
from tiny_flux import load, render

from fedgfe_store import EmbeddingStore, Schema
from fedgfe_store.demo import experiment
from fedgfe_store.demo.adapters import Adapter
from fedgfe_store.demo.federation import (
    NODES,
    average,
    embed,
    evaluate,
    federate,
    held_out_clips,
    make_clips,
    new_adapter,
    train,
    training_clips,
)
from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.demo.sounds import MEL_BANDS, SAMPLE_RATE, log_mel, make_clip
from fedgfe_store.errors import SchemaMismatchError

ROUNDS = 20


@pytest.fixture(scope="module")
def training():
    return [training_clips(node) for node in NODES]


@pytest.fixture(scope="module")
def held_out():
    return held_out_clips()


@pytest.fixture(scope="module")
def rounds(training):
    """The whole federation, as the demo runs it."""
    return list(federate(training, rounds=ROUNDS))


@pytest.mark.parametrize("hertz", [250, 440, 1000, 1800, 3300])
def test_a_tone_peaks_in_the_band_centred_nearest_to_it(hertz):
    time = torch.arange(SAMPLE_RATE, dtype=torch.float64) / SAMPLE_RATE
    levels = log_mel(torch.sin(2 * torch.pi * hertz * time)[None])
    assert levels.shape == (1, MEL_BANDS, 32)
    loudest = levels[0, :, 2:-2].argmax(dim=0)
    # Evenly spaced in mel, from nothing to the highest frequency that there is.
    highest = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    mels = highest * np.arange(1, MEL_BANDS + 1) / (MEL_BANDS + 1)
    centres = 700 * (10 ** (mels / 2595) - 1)
    assert (loudest == int(np.abs(centres - hertz).argmin())).all()


def test_features_do_not_hear_loudness():
    clips = torch.from_numpy(np.stack([make_clip("dog", node="0", split="train", index=0)]))
    assert torch.allclose(log_mel(clips), log_mel(clips * 3), atol=1e-2)
    assert log_mel(torch.zeros(1, SAMPLE_RATE)).isfinite().all()


def test_clips_differ_by_all_that_names_them_and_by_nothing_else():
    named: dict[str, Any] = {"node": "0", "split": "train", "index": 0}
    first = make_clip("drum", **named)
    assert first.shape == (SAMPLE_RATE,)
    assert 0.3 <= np.abs(first).max() <= 0.9
    assert np.array_equal(first, make_clip("drum", **named))
    for other in ({"node": "1"}, {"split": "test"}, {"index": 1}, {"seed": 1}):
        assert not np.allclose(first, make_clip("drum", **named | other)), other
    with pytest.raises(SchemaMismatchError, match=r"class.*dog.*cat"):
        make_clip("cat", **named)


def test_nodes_hear_different_shares_of_the_classes(training):
    shares = np.stack([np.bincount(c.classes, minlength=len(CLASSES)) for c in training])
    assert shares.min() > 0
    assert (shares.argmax(axis=0) == np.arange(len(CLASSES)) % len(NODES)).all()
    assert (shares.max(axis=0) >= 5 * shares.min(axis=0)).all()


def test_the_server_averages_as_numpy_does():
    states = [new_adapter(seed).state_dict() for seed in range(3)]
    weights = [104, 88, 3]
    averaged = average(states, weights)
    assert averaged.keys() == states[0].keys()
    for name, got in averaged.items():
        expected = np.average([s[name].double().numpy() for s in states], axis=0, weights=weights)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0]])
def test_weights_that_are_none_are_refused(weights):
    states = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    with pytest.raises(SchemaMismatchError, match="weights: expected 2"):
        average(states, weights)


def test_a_round_is_the_nodes_training_from_the_servers_adapter_and_their_average(training):
    first, second = federate(training, rounds=2)
    again = new_adapter(0)
    again.load_state_dict(first.adapters["server"].state_dict())
    alone = next(iter(federate(training[:1], rounds=1))).adapters
    assert_same(alone["server"].state_dict(), alone["0"].state_dict())
    weights = [len(clips) for clips in training]
    averaged = average([second.adapters[n].state_dict() for n in NODES], weights)
    assert_same(second.adapters["server"].state_dict(), averaged)
    assert_same(first.adapters["server"].state_dict(), again.state_dict())


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_embeddings_have_flux_shapes_and_an_encoders_scale():
    t5, clip = embed(new_adapter(3), make_clips("0", "test", [1] * len(CLASSES)))
    assert t5.shape == (10, 17, 4096)
    assert clip.shape == (10, 768)
    assert t5.dtype == clip.dtype == torch.float32
    for part in (t5, clip):
        assert part.mean(dim=-1).abs().max() < 1e-4
        assert (part.std(dim=-1) - 1).abs().max() < 1e-2


def test_training_lowers_the_loss(training):
    adapter = new_adapter(0)
    losses = [train(adapter, training[0], seed=k) for k in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_the_federation_learns_what_no_node_trained_on(rounds, held_out):
    losses = [evaluate(r.adapters["server"], held_out)[0] for r in rounds]
    assert losses[0] > 3
    assert losses[-1] < 0.5
    assert [r.number for r in rounds] == list(range(1, ROUNDS + 1))
    assert rounds[-1].loss < 0.2 * rounds[0].loss
    assert evaluate(rounds[-1].adapters["server"], held_out)[1] >= 0.95


@pytest.mark.slow
@pytest.mark.long
def test_another_seed_learns_too():
    seed = 1
    clips = [training_clips(node, seed=seed) for node in NODES]
    *_, last = federate(clips, rounds=ROUNDS, seed=seed)
    assert evaluate(last.adapters["server"], held_out_clips(seed=seed))[1] >= 0.9


@pytest.mark.slow
def test_pictures_of_held_out_sounds_are_clear_in_the_end_and_not_at_first(rounds, held_out):
    pipeline = load()
    classes = held_out.class_names
    assert len(classes) == 100
    noise = torch.randn(100, 16, 64, generator=torch.Generator().manual_seed(0))

    def right(step, every: int) -> float:
        t5, clip = (part[::every] for part in embed(step.adapters["server"], held_out))
        parts = zip(t5.split(20), clip.split(20), noise[::every].split(20), strict=True)
        images = [image for part in parts for image in render(pipeline, *part)]
        return accuracy(images, classes[::every])

    assert right(rounds[0], 5) <= 0.3
    assert right(rounds[-1], 1) >= 0.9


# The adapters of the nodes and the server, and what they say of clips. Torch has a thread for each
# processor that it sees.
TRAINING = """
import hashlib, os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from fedgfe_store.demo.federation import NODES, embed, federate, held_out_clips, training_clips
before = torch.get_num_threads()
clips, digest = held_out_clips().first(2), hashlib.sha256()
for step in federate([training_clips(node) for node in NODES], rounds=2):
    for node, adapter in sorted(step.adapters.items()):
        for tensor in (*adapter.state_dict().values(), *embed(adapter, clips)):
            digest.update(tensor.numpy().tobytes())
assert torch.get_num_threads() == before, "the caller's threads are not restored"
print(digest.hexdigest(), before)
"""


def trained(processors: str, hash_seed: str) -> tuple[str, int]:
    """Train in a process of its own; return a digest of all tensors, and torch's threads there."""
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", TRAINING, processors]
    done = finished(command, env={**free, "PYTHONHASHSEED": hash_seed})
    digest, threads = done.stdout.split()
    return digest, int(threads)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be confined")
def test_training_gives_the_same_bytes_on_one_processor_and_on_more():
    alone, together = trained("one", "1"), trained("all", "2")
    assert alone[1] == 1
    assert together[1] > 1 or len(os.sched_getaffinity(0)) == 1
    assert alone[0] == together[0]


def test_training_leaves_the_callers_threads_alone(training):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        (step,) = federate(training, rounds=1)
        evaluate(step.adapters["server"], training[0])
        with pytest.raises(SchemaMismatchError):
            average([step.adapters["0"].state_dict()], [1, 2])
        with pytest.raises(IndexError):
            train(step.adapters["0"], replace(training[0], classes=torch.tensor([10**6])), seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_making_an_adapter_leaves_torchs_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    assert isinstance(new_adapter(1), Adapter)
    assert torch.equal(torch.randn(3), expected)


@pytest.fixture
def short(monkeypatch):
    """An experiment of two rounds, both recorded."""
    monkeypatch.setattr(experiment, "ROUNDS", 2)
    monkeypatch.setattr(experiment, "RECORDED", (1, 2))


@pytest.mark.long
@pytest.mark.slow
def test_a_broken_off_experiment_is_finished_with_the_same_embeddings(short, tmp_path):
    whole, broken = (
        EmbeddingStore.create(tmp_path / name, Schema.flux(17)) for name in ("whole", "broken")
    )
    experiment.run(whole, audio=tmp_path / "audio")

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(broken, audio=tmp_path / "audio", report=stop)
    assert len(broken.select()) == 120
    experiment.run(broken, audio=tmp_path / "audio")
    reports: list[Any] = []
    experiment.run(broken, audio=tmp_path / "audio", report=reports.append)
    assert reports == []
    digests = [
        s.select().records.set_index(["node", "round", "split", "class_name", "index"])[
            ["t5_digest", "clip_digest"]
        ]
        for s in (whole, broken)
    ]
    assert len(digests[0]) == 240
    assert digests[0].equals(digests[1])


def test_recorded_clips_can_be_heard(demo):
    records = EmbeddingStore.open(demo.folder / "embeddings.zarr").select(round=20).records
    assert records["audio_path"].nunique() == 120
    one = records.query("node == '1' and split == 'test' and class_name == 'drum'").iloc[0]
    with wave.open(str(demo.folder / one["audio_path"])) as file:
        assert file.getframerate() == SAMPLE_RATE
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    made = make_clip("drum", node="1", split="test", index=0)
    np.testing.assert_allclose(heard, made, atol=1 / 32767)
