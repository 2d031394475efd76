"""What generated images teach: a classifier trained on them and tested on real ones, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgfe_store.common.extra import extra
from fedgfe_store.common.words import names
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.images.embedded import Embedded, Embedder
from fedgfe_store.images.fidelity import pictures_below
from fedgfe_store.images.scoring import Found
from fedgfe_store.images.status import natural_rank
from fedgfe_store.records import KEY_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

    from fedgfe_store.images.features import Features

MEASURES = {
    "tstr": "tstr: accuracy on real pictures of a classifier trained on the group's images",
    "trts": "trts: accuracy on the group's images of a classifier trained on real pictures",
}
"""Columns of `train_and_test`, and what they mean."""

_COLUMNS = ("pictures", "others", "classes", *MEASURES)


@dataclass(frozen=True, eq=False)
class Transfer:
    """How well classifiers go over from generated images to real ones, and back.

    Parameters
    ----------
    frame : DataFrame
        A row for each group: its keys, ``pictures`` (its images), ``others`` (real pictures of the
        classes that it has images of), ``classes`` (how many these are), ``tstr`` and ``trts``
        (accuracies from 0 to 1; NaN for ``tstr`` where there are fewer than two classes).
    left_out : mapping
        Why a file was not looked at, by its name.
    """

    frame: pd.DataFrame
    left_out: Mapping[str, str]


def real_classes(folder: Path, classes: Sequence[str]) -> dict[Path, str]:
    """Return the pictures of a folder with a subfolder for each class, and the class of each.

    Parameters
    ----------
    folder : Path
        The folder; pictures that lie in it beside the subfolders count for nothing.
    classes : sequence of str
        The classes that are asked for.

    Raises
    ------
    NotFoundError
        If there is no such folder, or fewer than two of its subfolders are called like `classes`.
    """
    found = {
        file: file.relative_to(folder).parts[0]
        for file in pictures_below(folder)
        if file.parent != folder
    }
    found = {file: name for file, name in found.items() if name in set(classes)}
    if len(set(found.values())) < 2:
        raise NotFoundError(
            f"{folder}: expected a subfolder with pictures for each class, such as "
            f"{names(classes[:3])}; got {names(set(found.values())) or 'none'}"
        )
    return found


def train_and_test(
    found: Found,
    features: Features,
    real: Mapping[Path, str],
    *,
    by: Sequence[str] = ("node", "round"),
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda pictures: None,
) -> Transfer:
    """Train a classifier on each group's images and test it on real pictures, and the reverse.

    It is scikit-learn's logistic regression with what it does by default, of features that are
    scaled to zero mean and unit variance. Of a set at most 10,000 pictures are looked at.

    Parameters
    ----------
    found : Found
        The images; those of classes without a real picture count for nothing.
    features : Features
        What is known of a picture.
    real : mapping of Path to str
        Real pictures, and their classes.
    by : sequence of str
        Key columns that make a group, without the class.
    batch_size : int
        Images in memory and in a call of the model.
    progress : callable
        Called with the number of pictures just embedded.

    Raises
    ------
    NotFoundError
        If none of the images is of a class of `real`, or scikit-learn is not installed.
    SchemaMismatchError
        If `by` has no key, or the class.
    """
    import pandas as pd

    groups = [name for name in KEY_COLUMNS if name != "class_name"]
    if not set(by) <= set(groups):
        raise SchemaMismatchError(f"by: expected some of {', '.join(groups)}, got {list(by)}")
    known = set(real.values())
    images = [image for image in found.images if image.key.value("class_name") in known]
    if not images:
        raise NotFoundError(f"no image is of one of the classes {names(known)}")
    extra("sklearn", "a classifier")
    with tempfile.TemporaryDirectory() as folder:
        embedder = Embedder(features.embed, Path(folder), batch_size, progress)
        own = _Labelled(embedder.embed([image.file for image in images]),
                        np.array([i.key.value("class_name") for i in images], object))  # fmt: skip
        others = _Labelled(embedder.embed(list(real)), np.array(list(real.values()), object))
        keys = pd.DataFrame({name: [i.key.value(name) for i in images] for name in by})
        rows = list(_rows(keys, by, own, others))
    frame = pd.DataFrame(rows, columns=[*by, *_COLUMNS])
    if by:
        frame = frame.sort_values(list(by), key=natural_rank, ignore_index=True)
    return Transfer(frame, {**found.left_out, **embedder.left_out})


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Pictures' features, and the class of each."""

    pictures: Embedded
    classes: np.ndarray

    def some(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.pictures.compared(rows)
        return self.pictures.read(rows), self.classes[rows]


def _rows(
    keys: pd.DataFrame, by: Sequence[str], own: _Labelled, others: _Labelled
) -> Iterator[list[Any]]:
    real, real_names = others.some(np.arange(len(others.classes)))
    taught = _train(real, real_names)
    groups = keys.groupby(list(by)).indices if by else {(): np.arange(len(own.classes))}
    for key, rows in groups.items():
        values, classes = own.some(np.asarray(rows))
        known = np.isin(real_names, classes)
        learnt = _train(values, classes)
        right = (learnt.predict(real[known]) == real_names[known]).mean() if learnt else np.nan
        back = (taught.predict(values) == classes).mean() if taught and len(values) else np.nan
        label = key if isinstance(key, tuple) else (key,)
        yield [*label, len(values), int(known.sum()), len(set(classes)), float(right), float(back)]


def _train(values: np.ndarray, classes: np.ndarray) -> Any:
    """Return a classifier; None where there is one class, which teaches nothing."""
    if len(set(classes)) < 2:
        return None
    scaler = extra("sklearn.preprocessing", "a classifier").StandardScaler()
    # As many steps as it takes: 100, as by default, are too few for some features.
    model = extra("sklearn.linear_model", "a classifier").LogisticRegression(max_iter=10_000)
    return (
        extra("sklearn.pipeline", "a classifier")
        .make_pipeline(scaler, model)
        .fit(values, classes.astype(str))
    )
