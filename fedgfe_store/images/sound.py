"""Sound files as samples at a model's rate, and where those of records lie."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgfe_store.common.extra import extra
from fedgfe_store.derived_keys import Key

if TYPE_CHECKING:
    from fedgfe_store.selection import Selection

SECONDS = 10
"""How much of a sound is listened to, from its beginning: as much as CLAP takes. Of longer ones its
processor would take a part by chance."""


def read_sound(path: Path, rate: int) -> np.ndarray | None:
    """Read the beginning of a sound file, in any format that libsndfile knows.

    Parameters
    ----------
    path : Path
        WAV, FLAC, OGG, MP3 and others.
    rate : int
        Samples per second that are wanted.

    Returns
    -------
    ndarray or None
        float32 ``[samples]`` within -1 and 1, the mean of its channels; None where the file is
        damaged or empty.

    Raises
    ------
    NotFoundError
        If soundfile or SciPy is not installed.
    """
    soundfile = extra("soundfile", "reading sounds", "audio")
    signal = extra("scipy.signal", "reading sounds", "audio")
    try:
        with path.open("rb") as opened, soundfile.SoundFile(opened) as file:
            own = int(file.samplerate)
            samples = file.read(SECONDS * own, dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError:
        return None
    if not len(samples):
        return None
    shared = gcd(own, rate)
    resampled: np.ndarray = signal.resample_poly(samples, rate // shared, own // shared)
    return resampled.astype(np.float32)


def sound_files(selection: Selection, folder: Path) -> Mapping[Key, Path]:
    """Return where the sounds of records should be; a record that names none is left out.

    Parameters
    ----------
    selection : Selection
        The records; their tensors are not read.
    folder : Path
        Where paths that are not absolute begin. Files of other machines' paths are looked for by
        their names in it, too.
    """
    names = selection.column("audio_path").tolist()
    found = {name: _placed(Path(name), folder) for name in dict.fromkeys(names) if name}
    files: dict[Key, Path] = {}
    for key, name in zip(selection.keys(), names, strict=True):
        if name:
            files[key] = found[name]
    return files


def _placed(path: Path, folder: Path) -> Path:
    here = folder / path.name
    return here if path.is_absolute() and not path.exists() and here.exists() else folder / path
