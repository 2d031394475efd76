"""What a store holds: its tensor columns, their precision, and how they are cut into files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Literal, Self

from fedgfe_store.errors import SchemaMismatchError

Kind = Literal["flux", "sd"]
Precision = Literal["float32", "bfloat16"]

FORMAT_VERSION = 2
"""What new stores are written in; version 1 is read, and written on unchanged."""
_CHUNK_BYTES = 0.3 * 2**20
_LARGE_RECORD_BYTES = 4 * 2**20


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
                if text is not None and not (isinstance(text, str) and _is_utf8(text)):
                    raise SchemaMismatchError(f"{name}: expected text, got {text!r}")


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

    def __post_init__(self) -> None:
        if self.kind not in ("flux", "sd"):
            raise SchemaMismatchError(f"kind: expected 'flux' or 'sd', got {self.kind!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise SchemaMismatchError(
                f"precision: expected 'float32' or 'bfloat16', got {self.precision!r}"
            )
        if not isinstance(self.granule, int) or not 1 <= self.granule <= 16384:
            raise SchemaMismatchError(f"granule: expected 1 to 16384 records, got {self.granule!r}")
        if not self.tensors:
            raise SchemaMismatchError("tensors: expected at least one tensor column, got none")
        for column in self.tensors:
            _check_column(column)

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
        """Return the schema that `to_json` wrote."""
        tensors = tuple(
            TensorColumn(name, tuple(t["shape"]), tuple(t["dims"]), t["optional"])
            for name, t in data["tensors"].items()
        )
        known = data["metadata"]
        metadata = Metadata(**{**known, "classes": tuple(known["classes"])})
        return cls(data["kind"], tensors, data["precision"], data["granule"], metadata)

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
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in column.shape)
    if not whole or not column.shape or len(column.shape) != len(column.dims):
        raise SchemaMismatchError(
            f"{column.name}: expected a shape of positive whole numbers with one name for each "
            f"axis, got shape {column.shape!r} and axes {column.dims!r}"
        )


def _is_utf8(text: str) -> bool:
    return text == text.encode(errors="replace").decode()
