"""Synthetic clips of the demo's ten classes, and the log-mel features that adapters hear."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedgfe_store.errors import SchemaMismatchError

Signal = NDArray[np.float64]

SAMPLE_RATE = 8000
"""Samples per second; a clip lasts one second."""

MEL_BANDS = 32
"""Bands of the features, from 0 Hz to half the sample rate."""

_WINDOW, _HOP = 512, 256
_FLOOR = 1e-5
_LOUDEST_ROOM = 0.3
_TIME: Signal = np.arange(SAMPLE_RATE) / SAMPLE_RATE


def make_clip(class_name: str, *, node: str, split: str, index: int, seed: int = 0) -> Signal:
    """Make the sound of a class, the same whenever it is asked for.

    Pitch, rhythm and loudness vary from clip to clip. Each node has a room of its own, whose
    noise and damping all its clips share.

    Parameters
    ----------
    class_name : str
        One of `fedgfe_store.demo.pictograms.CLASSES`.
    node, split : str
        Who has the clip, and for what.
    index : int
        Number of the clip within node, split and class.
    seed : int
        Seed of the experiment.

    Returns
    -------
    numpy.ndarray
        float64 [8000], within -1 and 1.

    Raises
    ------
    SchemaMismatchError
        If there is no such class.
    """
    if class_name not in _SOUNDS:
        raise SchemaMismatchError(f"class: expected one of {', '.join(_SOUNDS)}, got {class_name}")
    rng = _rng(seed, node, split, class_name, index)
    sound = _SOUNDS[class_name](rng)
    room = _rng(seed, node, "room")
    damped = _shape(sound, lambda hertz: (1 + hertz / 1000) ** -room.uniform(0, 0.6))
    sound = damped / damped.std() + room.uniform(0.05, _LOUDEST_ROOM) * _hiss(rng, 50, 3900)
    loud: Signal = sound / np.abs(sound).max() * rng.uniform(0.3, 0.9)
    return loud


def log_mel(clips: Tensor) -> Tensor:
    """Turn clips into what adapters hear: logarithms of the power in mel bands.

    Parameters
    ----------
    clips : torch.Tensor
        Float [n, samples] at `SAMPLE_RATE`.

    Returns
    -------
    torch.Tensor
        float32 [n, MEL_BANDS, frames], a frame every 32 ms; each clip has zero mean and unit
        variance, so that loudness does not matter.
    """
    spectrum = torch.stft(
        clips.float(),
        _WINDOW,
        _HOP,
        window=torch.hann_window(_WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    power = torch.einsum("mf,nft->nmt", _mel_filters(), spectrum.abs().square())
    levels = power.clamp(min=_FLOOR).log()
    mean, deviation = levels.mean(dim=(1, 2), keepdim=True), levels.std(dim=(1, 2), keepdim=True)
    return (levels - mean) / deviation.clamp(min=_FLOOR)


def save_wav(clip: Signal, path: Path) -> None:
    """Write a clip as 16-bit mono WAV, to be listened to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((clip * 32767).round().astype("<i2").tobytes())


def _rng(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _mel_edges() -> Signal:
    # O'Shaughnessy's mel scale, as in HTK.
    highest = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    mels = np.linspace(0, highest, MEL_BANDS + 2)
    edges: Signal = 700 * (10 ** (mels / 2595) - 1)
    return edges


@cache
def _mel_filters() -> Tensor:
    """Triangles that rise from one band's centre to the next, float32 [band, frequency]."""
    edges = _mel_edges()
    hertz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    rising = (hertz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hertz) / np.diff(edges)[1:, None]
    return torch.from_numpy(np.minimum(rising, falling).clip(min=0)).float()


def _shape(signal: Signal, gain: Callable[[Signal], Signal]) -> Signal:
    """Multiply a signal's spectrum with a gain that depends on the frequency in hertz."""
    hertz: Signal = np.fft.rfftfreq(SAMPLE_RATE, 1 / SAMPLE_RATE).astype(np.float64)
    spectrum = np.fft.rfft(signal) * gain(hertz)
    return np.fft.irfft(spectrum, SAMPLE_RATE)


def _hiss(rng: np.random.Generator, low: float, high: float) -> Signal:
    """Noise of unit variance between two frequencies."""
    noise = _shape(
        rng.standard_normal(SAMPLE_RATE), lambda hz: np.where((low <= hz) & (hz <= high), 1.0, 0.0)
    )
    unit: Signal = noise / noise.std()
    return unit


def _tone(hertz: float | Signal, harmonics: int = 1) -> Signal:
    """Sum the harmonics of a pitch, which may change over time, falling as 1/k."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, SAMPLE_RATE)) / SAMPLE_RATE
    orders = np.arange(1, harmonics + 1)[:, None]
    tone: Signal = (np.sin(orders * phase) / orders).sum(axis=0)
    return tone


def _hits(starts: ArrayLike, decay: float) -> Signal:
    """Sum envelopes that begin at once and die away within about ``decay`` seconds."""
    since = _TIME - np.asarray(starts)[:, None]
    hits: Signal = np.where(since >= 0, np.exp(-np.maximum(since, 0) / decay), 0).sum(axis=0)
    return hits


def _beats(rng: np.random.Generator, rate: float) -> Signal:
    """Start times of a steady rhythm, beginning anywhere."""
    starts: Signal = np.arange(rng.uniform(-1, 0) / rate, 1, 1 / rate)
    return starts


def _baby_cry(rng: np.random.Generator) -> Signal:
    wail = np.sin(np.pi * ((_TIME * rng.uniform(1.2, 2) + rng.uniform()) % 1))
    vibrato = 12 * np.sin(2 * np.pi * rng.uniform(5, 8) * _TIME)
    return wail * _tone(rng.uniform(350, 520) + 120 * wail + vibrato, 6)


def _chainsaw(rng: np.random.Generator) -> Signal:
    revs = 1 + 0.25 * np.sin(2 * np.pi * (rng.uniform(0.5, 1.5) * _TIME + rng.uniform()))
    return _tone(rng.uniform(90, 140) * revs, 24) + 0.3 * _hiss(rng, 800, 3500)


def _dog(rng: np.random.Generator) -> Signal:
    starts = rng.uniform(0, 0.2) + np.arange(rng.integers(2, 4)) * rng.uniform(0.25, 0.35)
    barks = _hits(starts, 0.05)
    return barks * (_tone(rng.uniform(350, 500) + 400 * barks, 5) + 0.4 * _hiss(rng, 300, 2500))


def _drum(rng: np.random.Generator) -> Signal:
    starts = _beats(rng, rng.uniform(2.5, 4.5))
    skin = _hits(starts, 0.09) * _tone(rng.uniform(90, 160), 2)
    return skin + 0.3 * _hits(starts, 0.01) * _hiss(rng, 500, 3500)


def _fireworks(rng: np.random.Generator) -> Signal:
    bang = rng.uniform(0.4, 0.6)
    whistle = _tone(rng.uniform(900, 1300) + 1500 * _TIME / bang) * (bang > _TIME)
    crackle = _hits(rng.uniform(bang, 1, 12), 0.01) * _hiss(rng, 1000, 3900)
    return 0.5 * whistle + _hits([bang], 0.15) * _hiss(rng, 60, 2500) + 0.7 * crackle


def _helicopter(rng: np.random.Generator) -> Signal:
    blades = _hits(_beats(rng, rng.uniform(10, 14)), 0.03)
    return blades * _hiss(rng, 50, 700) + 0.3 * _tone(rng.uniform(600, 800), 3)


def _printer(rng: np.random.Generator) -> Signal:
    strokes = np.sin(2 * np.pi * rng.uniform(3, 5) * _TIME + rng.uniform(0, 6)) > 0
    motor = _tone(rng.uniform(1500, 1900), 2)
    return strokes * (motor + 0.5 * _hiss(rng, 2000, 3900)) + 0.1 * motor


def _rail_transport(rng: np.random.Generator) -> Signal:
    first = _beats(rng, rng.uniform(1.6, 2.4))
    clacks = _hits(np.concatenate([first, first + rng.uniform(0.1, 0.14)]), 0.03)
    return 1.5 * clacks * _hiss(rng, 300, 1500) + 0.6 * _hiss(rng, 40, 200)


def _snoring(rng: np.random.Generator) -> Signal:
    breath = np.sin(np.pi * (_TIME * rng.uniform(0.9, 1.4) + rng.uniform())) ** 4
    return breath * (_tone(rng.uniform(45, 75), 10) + 0.4 * _hiss(rng, 100, 900))


def _water_flowing(rng: np.random.Generator) -> Signal:
    bubbles = sum(
        _hits([start], 0.02) * _tone(rng.uniform(700, 2200)) for start in rng.uniform(0, 1, 10)
    )
    return 0.4 * _hiss(rng, 400, 3900) + bubbles


_SOUNDS: dict[str, Callable[[np.random.Generator], Signal]] = {
    "baby_cry": _baby_cry,
    "chainsaw": _chainsaw,
    "dog": _dog,
    "drum": _drum,
    "fireworks": _fireworks,
    "helicopter": _helicopter,
    "printer": _printer,
    "rail_transport": _rail_transport,
    "snoring": _snoring,
    "water_flowing": _water_flowing,
}
