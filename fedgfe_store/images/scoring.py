"""Class agreement: whether a CLIP model finds in generated images the class they should show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fedgfe_store.common.words import names
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.folder import ImageFolder, side_by_side
from fedgfe_store.images.foreign import BLANK, PictureNames
from fedgfe_store.images.record import ImageRecord
from fedgfe_store.images.status import natural_rank
from fedgfe_store.names import key_json
from fedgfe_store.records import KEY_COLUMNS, RecordKey

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from fedgfe_store.images.clip import Clip
    from fedgfe_store.selection import Selection

GROUPS = (*KEY_COLUMNS, "image")
"""What scores can be grouped by; all of them together leave each image by itself."""


def check_groups(by: Sequence[str]) -> None:
    """Refuse keys that form no groups of images."""
    if not by or not set(by) <= set(GROUPS) or len(set(by)) < len(by):
        raise SchemaMismatchError(f"by: expected some of {', '.join(GROUPS)}, got {list(by)}")


PROMPT = "a photo of a {class}"


@dataclass(frozen=True)
class Found:
    """The images of a selection in a folder.

    Parameters
    ----------
    images : sequence of ImageRecord
        Those of the selection, by file name.
    classes : sequence of str
        Classes that the store has records of, selected or not, whatever the folder holds.
    left_out : mapping
        Why a PNG file is no image of a record, by its name.
    """

    images: Sequence[ImageRecord]
    classes: Sequence[str]
    left_out: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Scores:
    """How similar images are to their classes' prompts.

    Parameters
    ----------
    frame : DataFrame
        A row for each image: ``node``, ``round``, ``split``, ``class_name``, ``index``,
        ``image`` (its number), ``file``, ``similarity`` (cosine of the embeddings of the image
        and of its class' prompt, from -1 to 1), ``closest`` (the class whose prompt is most
        similar) and ``agrees`` (whether that is its own).
    prompts : mapping
        The prompt of each class that was compared with. With a single one each image agrees,
        which says nothing.
    left_out : mapping
        Why a file has no score, by its name.
    """

    frame: pd.DataFrame
    prompts: Mapping[str, str]
    left_out: Mapping[str, str]

    def table(self, by: Sequence[str]) -> pd.DataFrame:
        """Summarise the scores of each group.

        Parameters
        ----------
        by : sequence of str
            Among ``node``, ``round``, ``split``, ``class_name``, ``index`` and ``image``.

        Returns
        -------
        DataFrame
            A row for each group, in the order of `by`: its columns, then ``pictures``,
            ``similarity`` (mean), ``agreement`` (share of the images whose closest class is
            their own, from 0 to 1; NaN where there was one class to choose from) and ``closest``
            (the class that was so most often).

        Raises
        ------
        SchemaMismatchError
            If a name is none of the six, or given twice.
        """
        check_groups(by)
        table = self.frame.groupby(list(by), as_index=False).agg(
            pictures=("file", "size"),
            similarity=("similarity", "mean"),
            agreement=("agrees", "mean"),
            closest=("closest", lambda names: names.mode().iloc[0]),
        )
        if len(self.prompts) < 2:
            table["agreement"] = float("nan")
        return table.sort_values(list(by), key=natural_rank, ignore_index=True)


def selected_images(selection: Selection, folder: Path, *, patterns: Iterable[str] = ()) -> Found:
    """Find the images of a selection, by the folder's manifests or their own provenance.

    Whether an image is up to date is not looked at; `image_status` tells. An image of another
    program is one of the selection where all that its name tells of a record is that of one.

    Parameters
    ----------
    selection : Selection
        The records; their tensors are not read.
    folder : Path
        Folder of the images.
    patterns : iterable of str
        How other programs name their images, besides FedGFE; see `PictureNames.of`.

    Returns
    -------
    Found
        The images.

    Raises
    ------
    NotFoundError
        If there is no such folder, or no image of the selection in it.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no folder of pictures at {folder}")
    classes = sorted(set(selection.others().column("class_name").tolist()))
    records = ImageFolder.scan(folder, others=PictureNames.of(patterns, classes)).records
    known = [each for each in records.values() if isinstance(each, ImageRecord)]
    keys = selection.keys()
    selected: dict[tuple[str, ...], set[RecordKey]] = {}
    for lacking in {image.lacking for image in known}:
        blank = {name: BLANK[name] for name in lacking}
        selected[lacking] = {replace(key, **blank) if blank else key for key in keys}
    images = [image for image in known if image.key in selected[image.lacking]]
    if not images:
        raise NotFoundError(f"no picture in {folder} of the {len(selection)} records selected")
    left_out = {name: why for name, why in records.items() if isinstance(why, str)}
    return Found(images, classes, left_out)


def score_pictures(
    found: Found,
    clip_model: str,
    *,
    among: Sequence[str] | None = None,
    prompt: str = PROMPT,
    batch_size: int = 32,
    device: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Compare images with the prompts of the classes.

    An image is compared with every class of the store, so that neither filters nor what else
    lies in its folder change a score.

    Parameters
    ----------
    found : Found
        The images.
    clip_model : str
        A CLIP model of transformers: its folder, which needs no network, or its name on the hub.
    among : sequence of str, optional
        Classes to compare with instead of the store's; those of the images must be among them.
    prompt : str
        What is said of a class; ``{class}`` stands for its name, whose underscores become spaces.
    batch_size : int
        Images in memory and in a call of the model.
    device : str, optional
        By default a GPU where there is one.
    progress : callable, optional
        Called with the number of images just done.

    Returns
    -------
    Scores
        Scores of all images that could be read, and why others could not.

    Raises
    ------
    NotFoundError
        If there is no such model, or no image could be read.
    SchemaMismatchError
        If the prompt lacks ``{class}`` or is the same for two classes, `among` lacks the class
        of an image, the batch size is less than 1, or the model is no CLIP.
    """
    from fedgfe_store.images.clip import Clip

    if batch_size < 1:
        raise SchemaMismatchError(f"batch_size: expected from 1 up, got {batch_size}")
    prompts = class_prompts(_compared(found, among), prompt)
    clip = Clip.load(clip_model, device)
    texts = clip.embed_texts(list(prompts.values()))
    rows: list[list[Any]] = []
    left_out = dict(found.left_out)
    for first in range(0, len(found.images), batch_size):
        batch = found.images[first : first + batch_size]
        pictures = side_by_side(opened, [record.file for record in batch])
        pairs = list(zip(batch, pictures, strict=True))
        left_out |= {record.name: "damaged" for record, image in pairs if image is None}
        rows += _score(pairs, clip, texts, list(prompts))
        if progress is not None:
            progress(len(batch))
    if not rows:
        folder = found.images[0].folder
        raise NotFoundError(f"none of {len(found.images)} pictures in {folder} is sound")
    return Scores(_frame(rows), prompts, left_out)


def _compared(found: Found, among: Sequence[str] | None) -> list[str]:
    """Return the classes to compare with, in the order that decides between equals."""
    if among is None:
        return list(found.classes)
    if isinstance(among, str):
        raise SchemaMismatchError(f"among: expected a list of classes, got {among!r}")
    lacking = {str(image.key.value("class_name")) for image in found.images} - set(among)
    if lacking:
        raise SchemaMismatchError(
            f"among: expected the classes of the pictures too, got none of {names(lacking)}"
        )
    return sorted(set(among))


def class_prompts(classes: Iterable[str], prompt: str = PROMPT) -> dict[str, str]:
    """Say of each class what its images should show.

    Parameters
    ----------
    classes : iterable of str
        Names of the classes.
    prompt : str
        ``{class}`` stands for the name, whose underscores become spaces.

    Returns
    -------
    dict
        Prompt by class.

    Raises
    ------
    SchemaMismatchError
        If the prompt lacks ``{class}``, or is the same for two classes.
    """
    if "{class}" not in prompt:
        raise SchemaMismatchError(f"prompt: expected {{class}} in it, got {prompt!r}")
    prompts: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in classes:
        text = prompt.replace("{class}", name.replace("_", " "))
        other = owners.setdefault(text, name)
        if other != name:
            raise SchemaMismatchError(f"classes {other!r} and {name!r}: both are called {text!r}")
        prompts[name] = text
    return prompts


def _score(
    pairs: Iterable[tuple[ImageRecord, Image.Image | None]],
    clip: Clip,
    texts: torch.Tensor,
    classes: Sequence[str],
) -> list[list[Any]]:
    sound = [(record, image) for record, image in pairs if image is not None]
    if not sound:
        return []
    similarities = clip.embed_images([image for _, image in sound]) @ texts.T
    rows = []
    for (record, _), values in zip(sound, similarities.tolist(), strict=True):
        own = str(record.key.value("class_name"))
        closest = classes[max(range(len(classes)), key=values.__getitem__)]
        facts = [record.number, record.name, values[classes.index(own)], closest, closest == own]
        rows.append([*key_json(record.key).values(), *facts])
    return rows


def opened(path: Path, formats: tuple[str, ...] = ("PNG",)) -> Image.Image | None:
    """Return a picture file of one of Pillow's `formats` in RGB; None where it is damaged."""
    try:
        with Image.open(path, formats=formats) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return None


def _frame(rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    import pandas as pd

    columns = [*GROUPS, "file", "similarity", "closest", "agrees"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({"round": "int64", "index": "int64", "image": "int64"})
