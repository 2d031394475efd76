"""Whether images go with the sounds of their records: similarity, and retrieval among sounds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fedgfe_store.common.sample import drawn
from fedgfe_store.derived_keys import Key
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.embedded import Embedded, Embedder
from fedgfe_store.images.folder import side_by_side
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.images.scoring import GROUPS, Found, check_groups, class_prompts, opened
from fedgfe_store.images.sound import read_sound
from fedgfe_store.images.status import natural_rank
from fedgfe_store.names import key_json

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.images.clap import Clap
    from fedgfe_store.images.clip import Clip

MOST = 1_000
"""Sounds among which an image's own is looked for; of more as many are drawn, always the same."""
FIRST = (1, 5, 10)
"""Among how many of the most similar sounds the own one is to be: R@1, R@5, R@10."""
_SAME = 1e-6
"""Cosines that differ by less are equal: they are of float32 vectors."""
MISSING = "there is no such sound"
"""Why a sound is left out that is not where its record says."""
SOUND_PROMPT = "the sound of a {class}"


@dataclass(frozen=True)
class Space:
    """A space in which images and sounds lie.

    Parameters
    ----------
    rate : int
        Samples per second of the sounds.
    images, sounds : callable
        Give float32 unit vectors ``[n, width]`` of RGB images, and of sounds ``[samples]``.
    """

    rate: int
    images: Callable[[Sequence[Image.Image]], np.ndarray]
    sounds: Callable[[Sequence[np.ndarray]], np.ndarray]


def class_space(
    clap: Clap, clip: Clip, classes: Sequence[str], prompt: str, sound_prompt: str = SOUND_PROMPT
) -> Space:
    """Return the space of shares of classes, which a CLAP and a CLIP have in common.

    A sound lies where a CLAP finds it among the classes (the softmax of its similarities to their
    prompts), an image where a CLIP does. Sounds of one class are hardly told apart.

    Parameters
    ----------
    clap, clip : Clap, Clip
        What hears, and what sees.
    classes : sequence of str
        Two or more.
    prompt, sound_prompt : str
        What is said of a class to either; ``{class}`` stands for its name.

    Raises
    ------
    SchemaMismatchError
        If there are fewer than two classes, or a prompt is of no use.
    """
    if len(classes) < 2:
        raise SchemaMismatchError(f"classes: expected two or more, got {list(classes)}")
    seen = clip.embed_texts(list(class_prompts(classes, prompt).values()))
    heard = clap.embed_texts(list(class_prompts(classes, sound_prompt).values()))

    def shares(vectors: Any, texts: Any, scale: float) -> np.ndarray:
        found = (scale * vectors @ texts.T).softmax(dim=1)
        unit: np.ndarray = (found / found.norm(dim=1, keepdim=True)).numpy()
        return unit

    return Space(
        clap.rate,
        lambda images: shares(clip.embed_images(images), seen, clip.scale),
        lambda sounds: shares(clap.embed_sounds(sounds), heard, clap.scale),
    )


@dataclass(frozen=True, eq=False)
class Heard:
    """How similar images are to the sounds of their records.

    Parameters
    ----------
    frame : DataFrame
        A row for each image: its key columns, ``image``, ``file``, ``sound`` (the file),
        ``similarity`` (cosine), ``rank`` (1 where no other sound is more similar) and ``ties``
        (other sounds that are as similar).
    sounds : int
        Among how many sounds the own one was looked for.
    left_out : mapping
        Why a file was not looked at, by its name.
    """

    frame: pd.DataFrame
    sounds: int
    left_out: Mapping[str, str]

    def table(self, by: Sequence[str]) -> pd.DataFrame:
        """Summarise each group.

        Parameters
        ----------
        by : sequence of str
            Among ``node``, ``round``, ``split``, ``class_name``, ``index`` and ``image``.

        Returns
        -------
        DataFrame
            A row for each group, in the order of `by`: its columns, ``pictures``, ``similarity``
            (mean), and ``R@1``, ``R@5`` and ``R@10``: shares of images whose own sound is among so
            many most similar ones, were those that are equally similar put in any order. So a model
            that takes all sounds for the same has ``k / sounds``.

        Raises
        ------
        SchemaMismatchError
            If a name is none of the six, or given twice.
        """
        check_groups(by)
        rank, ties = self.frame["rank"], self.frame["ties"]
        recalls = {f"R@{k}": ((k + 1 - rank) / (ties + 1)).clip(0, 1) for k in FIRST}
        frame = self.frame.assign(**recalls)
        table = frame.groupby(list(by), as_index=False).agg(
            pictures=("file", "size"),
            similarity=("similarity", "mean"),
            **{name: (name, "mean") for name in recalls},
        )
        return table.sort_values(list(by), key=natural_rank, ignore_index=True)


def compare_with_sounds(
    found: Found,
    files: Mapping[Key, Path],
    space: Space,
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda files: None,
) -> Heard:
    """Compare images with the sounds of their records.

    An image's own sound is looked for among the sounds of all these images, of which at most 1,000
    are in memory.

    Parameters
    ----------
    found : Found
        The images.
    files : mapping of key to Path
        The sound of each record, see `sound_files`; images without one are left out.
    space : Space
        In which they are compared.
    batch_size : int
        Images or sounds in memory and in a call of a model.
    progress : callable
        Called with the number of sounds or images just done: first all sounds, then all images.

    Raises
    ------
    NotFoundError
        If no image has a sound that can be read, or none can be read itself.
    """
    left_out = dict(found.left_out)
    paired = [image for image in found.images if image.key in files]
    if not paired:
        raise NotFoundError(f"none of the {len(found.images)} images' records has an audio_path")
    left_out |= {i.name: "no audio_path" for i in found.images if i.key not in files}
    sounds = list(dict.fromkeys(files[image.key] for image in paired))
    there = [path for path in sounds if path.is_file()]
    if not there:
        raise NotFoundError(f"none of {len(sounds)} sounds is there, such as {sounds[0]}")
    left_out |= {str(path): MISSING for path in set(sounds) - set(there)}
    with tempfile.TemporaryDirectory() as folder:
        embedder = Embedder(
            space.sounds, Path(folder), batch_size, progress, partial(read_sound, rate=space.rate)
        )
        embedded = embedder.embed(there)
        heard = _Sounds(embedded, {path: row for row, path in enumerate(there)})
        paired = [image for image in paired if heard.has(files[image.key])]
        rows: list[list[Any]] = []
        for first in range(0, len(paired), batch_size):
            batch = paired[first : first + batch_size]
            pictures = list(side_by_side(opened, [image.file for image in batch]))
            pairs = [(i, p) for i, p in zip(batch, pictures, strict=True) if p is not None]
            damaged = {i.name for i in batch} - {i.name for i, _ in pairs}
            left_out |= dict.fromkeys(damaged, "damaged")
            rows += heard.rows(pairs, files, space)
            progress(len(batch))
    if not rows:
        raise NotFoundError(f"none of {len(paired)} pictures in {found.images[0].folder} is sound")
    return Heard(_frame(rows), len(heard.others), {**left_out, **embedder.left_out})


class _Sounds:
    """Sounds' vectors on the disk, and those in memory among which others are looked for."""

    def __init__(self, embedded: Embedded, places: Mapping[Path, int]) -> None:
        self._embedded, self._places = embedded, places
        rows = np.flatnonzero(embedded.there)
        self.others = rows[drawn(len(rows), MOST)]
        self._vectors = embedded.read(self.others)

    def has(self, path: Path) -> bool:
        """Whether a sound is there and could be read."""
        return path in self._places and bool(self._embedded.there[self._places[path]])

    def rows(
        self,
        pairs: Sequence[tuple[ImageRecord, Image.Image]],
        files: Mapping[Key, Path],
        space: Space,
    ) -> list[list[Any]]:
        """Return the facts of some images."""
        if not pairs:
            return []
        places = np.array([self._places[files[image.key]] for image, _ in pairs])
        vectors = space.images([picture for _, picture in pairs])
        similar = np.einsum("ij,ij->i", vectors, self._embedded.read(places))
        ahead = vectors @ self._vectors.T - similar[:, np.newaxis]
        ahead[self.others == places[:, np.newaxis]] = -np.inf  # itself
        ranks = 1 + (ahead > _SAME).sum(axis=1)
        ties = (np.abs(ahead) <= _SAME).sum(axis=1)
        facts = zip(pairs, similar.tolist(), ranks.tolist(), ties.tolist(), strict=True)
        return [
            [*key_json(image.key).values(), image.number, image.name, str(files[image.key]), *rest]
            for (image, _), *rest in facts
        ]


def _frame(rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[*GROUPS, "file", "sound", "similarity", "rank", "ties"])
    return frame.astype({"round": "int64", "index": "int64", "image": "int64"})
