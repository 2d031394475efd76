"""What a store holds: its tensor columns, their precision, and how they are cut into files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Literal, Self

from fedgfe_store.common.column_names import check_axes, check_columns, check_new_columns
from fedgfe_store.common.words import is_utf8, shown
from fedgfe_store.errors import SchemaMismatchError

Kind = Literal["flux", "sd"]
Precision = Literal["float32", "bfloat16"]

FORMAT_VERSION = 2
"""What new stores are written in; version 1 is read, and written on unchanged."""
_CHUNK_BYTES = 0.3 * 2**20
_LARGE_RECORD_BYTES = 4 * 2**20
LARGEST_CHUNK = 2**31 - 17
"""Bytes of float32 that blosc, which codes a record or several as one chunk, takes at most."""
_MOST_AXES = 31


@dataclass(frozen=True)
class Metadata:
    """What is known of the experiment as a whole.

    Parameters
    ----------
    experiment : str, optional
        Name of the experiment; it names the default folder of generated images.
    diffusion_type : str, optional
        What the training called its image model, ``"flux"`` or ``"sd"``.
    classes : tuple of str
        Classes of the experiment. A class that is appended later joins them.
    encoder : str, optional
        Fingerprint of the text encoders that the embeddings imitate.
    model : str, optional
        Image model used when ``generate`` is given none: hub id, folder or ``"tiny"``.
    """

    experiment: str | None = None
    diffusion_type: str | None = None
    classes: tuple[str, ...] = ()
    encoder: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if text is not None and not (isinstance(text, str) and is_utf8(text)):
                    raise SchemaMismatchError(f"{name}: expected text, got {shown(text)}")


@dataclass(frozen=True)
class TensorColumn:
    """One tensor per record: name, shape without the record axis, names of its axes.

    Only optional columns may be left out of a record; a bool column ``has_<name>`` tells.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    optional: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one record's float32 values."""
        return 4 * prod(self.shape)


@dataclass(frozen=True)
class Schema:
    """What every record of a store looks like.

    Use `Schema.flux` or `Schema.sd`; the constructor is for other sets of tensor columns.

    Parameters
    ----------
    kind : {"flux", "sd"}
        Family of image models that the embeddings condition.
    tensors : tuple of TensorColumn
        Tensor columns, float32.
    precision : {"float32", "bfloat16"}
        ``"float32"`` keeps every bit. ``"bfloat16"`` rounds to the nearest bfloat16 (ties to
        even) before writing; values stay float32 arrays and take about 0.4 of the space.
    granule : int
        Records per tensor file.
    metadata : Metadata
        What is known of the experiment.

    Raises
    ------
    SchemaMismatchError
        If a value is not one of those named above.
    """

    kind: Kind
    tensors: tuple[TensorColumn, ...]
    precision: Precision = "float32"
    granule: int = 32
    metadata: Metadata = field(default_factory=Metadata)
    _stored: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("flux", "sd"):
            raise SchemaMismatchError(f"kind: expected 'flux' or 'sd', got {shown(self.kind)}")
        if self.precision not in ("float32", "bfloat16"):
            raise SchemaMismatchError(
                f"precision: expected 'float32' or 'bfloat16', got {shown(self.precision)}"
            )
        if not _is_int(self.granule) or not 1 <= self.granule <= 16384:
            raise SchemaMismatchError(
                f"granule: expected 1 to 16384 records, got {shown(self.granule)}"
            )
        if not self.tensors:
            raise SchemaMismatchError("tensors: expected at least one tensor column, got none")
        for column in self.tensors:
            _check_column(column)
        check_columns([column.name for column in self.tensors])
        if not self._stored:
            self.check_new()

    def check_new(self) -> None:
        """Refuse what stores of earlier releases may have, and new ones may not.

        Raises
        ------
        SchemaMismatchError
            If a column's name is not plain, or an axis has two lengths or a column's name.
        """
        check_new_columns([column.name for column in self.tensors])
        check_axes({t.name: list(zip(t.dims, t.shape, strict=True)) for t in self.tensors})

    @classmethod
    def flux(
        cls,
        tokens: int = 17,
        *,
        width: int = 4096,
        clip: tuple[int, ...] = (768,),
        audio: tuple[int, int] | None = None,
        precision: Precision = "float32",
        granule: int | None = None,
        metadata: Metadata | None = None,
    ) -> Self:
        """Return the schema of FLUX conditioning: a T5 sequence and a CLIP vector per record.

        Parameters
        ----------
        tokens, width : int
            Shape of ``t5``, FLUX's ``prompt_embeds``: ``[tokens, width]``.
        clip : tuple of int
            Shape of ``clip``: ``(768,)``, FLUX's ``pooled_prompt_embeds``, or ``(77, 768)`` for
            a CLIP sequence that is pooled when images are made.
        audio : tuple of int, optional
            Shape of the optional column ``audio``, such as ``(1214, 768)``.
        precision : {"float32", "bfloat16"}
            How values are kept, see `Schema`.
        granule : int, optional
            Records per tensor file; by default from the size of a record.
        metadata : Metadata, optional
            What is known of the experiment.
        """
        t5 = TensorColumn("t5", (tokens, width), ("token", "t5_feature"))
        return cls._of("flux", (t5, _clip_column(clip)), audio, precision, granule, metadata)

    @classmethod
    def sd(
        cls,
        tokens: int = 77,
        *,
        width: int = 768,
        audio: tuple[int, int] | None = None,
        precision: Precision = "float32",
        granule: int | None = None,
        metadata: Metadata | None = None,
    ) -> Self:
        """Return the schema of Stable Diffusion conditioning: a sequence ``[tokens, width]``.

        The parameters are those of `Schema.flux`.
        """
        clip = _clip_column((tokens, width))
        return cls._of("sd", (clip,), audio, precision, granule, metadata)

    @classmethod
    def _of(
        cls,
        kind: Kind,
        tensors: tuple[TensorColumn, ...],
        audio: tuple[int, int] | None,
        precision: Precision,
        granule: int | None,
        metadata: Metadata | None,
    ) -> Self:
        if audio is not None:
            dims = ("audio_token", "audio_feature")
            tensors = (*tensors, TensorColumn("audio", tuple(audio), dims, optional=True))
        if granule is None:
            large = len(tensors) < 3 and sum(t.nbytes for t in tensors) > _LARGE_RECORD_BYTES
            granule = 16 if large else 32
        return cls(kind, tensors, precision, granule, metadata or Metadata())

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor column, without the record axis."""
        return {column.name: column.shape for column in self.tensors}

    @property
    def record_nbytes(self) -> int:
        """Bytes of one record's float32 values over all tensor columns."""
        return sum(column.nbytes for column in self.tensors)

    def column(self, name: str) -> TensorColumn:
        """Return the tensor column called `name`.

        Raises
        ------
        SchemaMismatchError
            If there is none.
        """
        for column in self.tensors:
            if column.name == name:
                return column
        raise SchemaMismatchError(
            f"tensor column: expected one of {', '.join(self.columns)}, got {name!r}"
        )

    def chunk_records(self, column: TensorColumn) -> int:
        """Return the records per inner chunk: up to 0.3 MiB, at least one, dividing the granule."""
        fitting = [
            n
            for n in range(1, self.granule + 1)
            if self.granule % n == 0 and n * column.nbytes <= _CHUNK_BYTES
        ]
        return max(fitting, default=1)

    def check_fits(self, other: Schema, name: str) -> None:
        """Refuse `other`, the schema of `name`, unless its records can be kept under this one.

        Raises
        ------
        SchemaMismatchError
            If kind, tensor shapes or the encoders' fingerprints differ; both are shown.
        """
        shapes = dict(other.columns)
        shapes |= {t.name: t.shape for t in self.tensors if t.optional and t.name not in shapes}
        if (other.kind, shapes) != (self.kind, self.columns):
            raise SchemaMismatchError(
                f"{name}: expected {self.describe()}, as in the store, got {other.describe()}"
            )
        ours, theirs = self.metadata.encoder, other.metadata.encoder
        if ours and theirs and ours != theirs:
            raise SchemaMismatchError(f"{name}: expected the encoder {ours!r}, got {theirs!r}")

    def with_classes(self, names: Iterable[str]) -> Self:
        """Return the schema with the classes `names` added behind those it has."""
        classes = tuple(dict.fromkeys((*self.metadata.classes, *names)))
        if classes == self.metadata.classes:
            return self
        return replace(self, metadata=replace(self.metadata, classes=classes))

    def to_json(self) -> dict[str, Any]:
        """Return the schema as it stands in a store's attributes."""
        return {
            "kind": self.kind,
            "tensors": {
                t.name: {"shape": list(t.shape), "dims": list(t.dims), "optional": t.optional}
                for t in self.tensors
            },
            "precision": self.precision,
            "granule": self.granule,
            "metadata": {**asdict(self.metadata), "classes": list(self.metadata.classes)},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the schema that `to_json` wrote.

        Raises
        ------
        SchemaMismatchError, TypeError or KeyError
            If it is not one that `to_json` wrote; names that only a new schema may not have are
            taken, see `check_new`.
        """
        tensors = tuple(
            TensorColumn(name, tuple(_list(t["shape"])), tuple(_list(t["dims"])), t["optional"])
            for name, t in _dict(data["tensors"]).items()
        )
        known = _dict(data["metadata"])
        metadata = Metadata(**{**known, "classes": tuple(_list(known["classes"]))})
        return cls(data["kind"], tensors, data["precision"], data["granule"], metadata, True)

    def describe(self) -> str:
        """Return kind and shapes in one line, for messages."""
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.columns.items())
        return f"{self.kind}: {shapes}"


def _clip_column(shape: tuple[int, ...]) -> TensorColumn:
    dims = {1: ("clip_feature",), 2: ("clip_token", "clip_feature")}
    if len(shape) not in dims:
        raise SchemaMismatchError(
            f"clip: expected a shape (768,) or (77, 768), got {tuple(shape)!r}"
        )
    return TensorColumn("clip", tuple(shape), dims[len(shape)])


def _check_column(column: TensorColumn) -> None:
    name = shown(column.name) if not isinstance(column.name, str) else column.name
    shape, dims = column.shape, column.dims
    fits = isinstance(shape, tuple) and isinstance(dims, tuple)
    fits = fits and all(_is_int(n) and n > 0 for n in shape)
    fits = fits and all(isinstance(axis, str) and is_utf8(axis) for axis in dims)
    if not fits or not 0 < len(shape) == len(dims) <= _MOST_AXES:
        raise SchemaMismatchError(
            f"{name}: expected a shape of positive whole numbers with one name for each "
            f"axis, got shape {shown(shape)} and axes {shown(dims)}"
        )
    if column.nbytes > LARGEST_CHUNK:
        raise SchemaMismatchError(
            f"{name}: expected a record of at most {LARGEST_CHUNK:,} bytes of float32, got the "
            f"shape {shown(shape)}"
        )
    if not isinstance(column.optional, bool):
        raise SchemaMismatchError(
            f"{name}: expected optional to be true or false, got {shown(column.optional)}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {shown(value)}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {shown(value)}")
    return value
