"""What a store holds: its tensor columns, their precision, and how they are cut into files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

from fedgfe_store.common.column_names import check_axes, check_columns, check_new_columns
from fedgfe_store.common.tensor_column import LARGEST_CHUNK, ColumnDtype, TensorColumn
from fedgfe_store.common.words import is_utf8, shown
from fedgfe_store.errors import SchemaMismatchError

__all__ = ["LARGEST_CHUNK", "ColumnDtype", "Compression", "Kind", "Metadata", "Precision"]
__all__ += ["Schema", "TensorColumn"]

Kind = str
"""Name of a conditioning: ``"flux"``, ``"sd"``, ``"sdxl"``, ``"custom"`` or any other."""
Precision = Literal["float32", "bfloat16"]
Compression = Literal["bitshuffle", "shuffle", "none"]
"""What becomes of values on their way to the disk: lz4 after sorting their bits, which is smallest,
or their bytes, or nothing at all, which is read fastest."""

FORMAT_VERSION = 2
"""What new stores are written in; version 1 is read, and written on unchanged."""
_CHUNK_BYTES = 0.3 * 2**20
_LARGE_RECORD_BYTES = 4 * 2**20
_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


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
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if text is not None and not (isinstance(text, str) and is_utf8(text)):
                    raise SchemaMismatchError(f"{name}: expected text, got {shown(text)}")


@dataclass(frozen=True)
class Schema:
    """What every record of a store looks like.

    `Schema.flux` and `Schema.sd` make the usual ones, `Schema.of` any other.

    Parameters
    ----------
    kind : str
        Name of the conditioning: ``"flux"``, ``"sd"``, ``"sdxl"``, ``"custom"`` or any other of
        lower-case letters, digits, ``-``, ``_`` and ``.``. What makes images asks for it.
    tensors : tuple of TensorColumn
        Tensor columns.
    precision : {"float32", "bfloat16"}
        ``"float32"`` keeps every bit. ``"bfloat16"`` rounds to the nearest bfloat16 (ties to
        even) before writing; values stay float32 arrays and take about 0.4 of the space. Masks
        and numbers are kept as they are.
    granule : int
        Records per tensor file.
    metadata : Metadata
        What is known of the experiment.
    compression : {"bitshuffle", "shuffle", "none"}
        How values are packed. ``"bitshuffle"``, lz4 after sorting bits, is smallest. ``"none"``
        takes 1.15 times the space of exact values and is read fastest; ``"shuffle"``, lz4 after
        sorting bytes, lies between. What is chosen holds for all that is appended.

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
    compression: Compression = "bitshuffle"
    _stored: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.kind, str) and _KIND.fullmatch(self.kind)):
            raise SchemaMismatchError(
                f"kind: expected a name such as 'flux', 'sd' or 'custom', of lower-case letters, "
                f"digits, '-', '_' and '.', got {shown(self.kind)}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise SchemaMismatchError(
                f"precision: expected 'float32' or 'bfloat16', got {shown(self.precision)}"
            )
        if self.compression not in get_args(Compression):
            raise SchemaMismatchError(
                f"compression: expected {', '.join(get_args(Compression))}, "
                f"got {shown(self.compression)}"
            )
        if type(self.granule) is not int or not 1 <= self.granule <= 16384:
            raise SchemaMismatchError(
                f"granule: expected 1 to 16384 records, got {shown(self.granule)}"
            )
        if not self.tensors:
            raise SchemaMismatchError("tensors: expected at least one tensor column, got none")
        for column in self.tensors:
            column.check()
        ragged = [column.name for column in self.tensors if column.ragged]
        check_columns([column.name for column in self.tensors], ragged)
        if not self._stored:
            self.check_new()

    def check_new(self) -> None:
        """Refuse what stores of earlier releases may have, and new ones may not.

        Raises
        ------
        SchemaMismatchError
            If a column's name is not plain, or an axis has two lengths or a column's name.
        """
        check_new_columns(list(self.columns))
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
        compression: Compression = "bitshuffle",
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
        compression : {"bitshuffle", "shuffle", "none"}
            How values are packed, see `Schema`.
        """
        t5 = TensorColumn("t5", (tokens, width), ("token", "t5_feature"))
        columns = (t5, _clip_column(clip))
        return cls._of("flux", columns, audio, precision, granule, metadata, compression)

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
        compression: Compression = "bitshuffle",
    ) -> Self:
        """Return the schema of Stable Diffusion conditioning: a sequence ``[tokens, width]``.

        The parameters are those of `Schema.flux`.
        """
        clip = _clip_column((tokens, width))
        return cls._of("sd", (clip,), audio, precision, granule, metadata, compression)

    @classmethod
    def of(
        cls,
        kind: Kind,
        /,
        *tensors: TensorColumn,
        precision: Precision = "float32",
        granule: int | None = None,
        metadata: Metadata | None = None,
        compression: Compression = "bitshuffle",
        **shapes: tuple[int, ...],
    ) -> Self:
        """Return the schema of any columns, such as those named by a pipeline's arguments.

        Parameters
        ----------
        kind : str
            Name of the conditioning, see `Schema`.
        *tensors : TensorColumn
            Columns of which more is to be said than a shape.
        precision, granule, metadata, compression
            As for `Schema.flux`.
        **shapes : tuple of int
            Shapes of columns of embeddings, by name.

        Examples
        --------
        >>> mask = TensorColumn("prompt_attention_mask", (512,), dtype="bool")
        >>> Schema.of("custom", mask, prompt_embeds=(512, 2304)).describe()
        'custom: prompt_attention_mask [512] bool, prompt_embeds [512, 2304]'
        """
        columns = (*tensors, *(TensorColumn(name, shape) for name, shape in shapes.items()))
        for column in columns:
            if not isinstance(column, TensorColumn):
                raise SchemaMismatchError(f"tensors: expected a TensorColumn, got {shown(column)}")
        return cls._of(kind, columns, None, precision, granule, metadata, compression)

    @classmethod
    def _of(
        cls,
        kind: Kind,
        tensors: tuple[TensorColumn, ...],
        audio: tuple[int, int] | None,
        precision: Precision,
        granule: int | None,
        metadata: Metadata | None,
        compression: Compression,
    ) -> Self:
        if audio is not None:
            dims = ("audio_token", "audio_feature")
            tensors = (*tensors, TensorColumn("audio", tuple(audio), dims, optional=True))
        if granule is None:
            for column in tensors:
                column.check()
            large = len(tensors) < 3 and sum(t.nbytes for t in tensors) > _LARGE_RECORD_BYTES
            granule = 16 if large else 32
        return cls(kind, tensors, precision, granule, metadata or Metadata(), compression)

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor column, without the record axis."""
        return {column.name: column.shape for column in self.tensors}

    @property
    def record_nbytes(self) -> int:
        """Bytes of one record's values over all tensor columns, as they are in memory."""
        return sum(column.nbytes for column in self.tensors)

    @property
    def marks(self) -> list[str]:
        """Names of the key columns ``has_<name>`` and ``length_<name>`` of the tensor columns."""
        return [name for column in self.tensors for name in column.marks]

    @property
    def features(self) -> tuple[str, ...]:
        """What a reader must know for such a store that the first release of version 2 did not."""
        needed = {
            "kinds": self.kind not in ("flux", "sd"),
            "dtypes": any(column.dtype != "float32" for column in self.tensors),
            "ragged": any(column.ragged for column in self.tensors),
            "compression": self.compression != "bitshuffle",
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)

    @property
    def is_plain(self) -> bool:
        """Whether it is of flux or sd, every column of embeddings of one length."""
        return not {"kinds", "dtypes", "ragged"} & {*self.features}

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
        ours = {t.name: (t.shape, t.dtype, t.ragged) for t in self.tensors}
        theirs = {t.name: (t.shape, t.dtype, t.ragged) for t in other.tensors}
        lacking = {t.name: ours[t.name] for t in self.tensors if t.optional}
        if (other.kind, lacking | theirs) != (self.kind, ours):
            raise SchemaMismatchError(
                f"{name}: expected {self.describe()}, as in the store, got {other.describe()}"
            )
        encoder, given = self.metadata.encoder, other.metadata.encoder
        if encoder and given and encoder != given:
            raise SchemaMismatchError(f"{name}: expected the encoder {encoder!r}, got {given!r}")

    def with_classes(self, names: Iterable[str]) -> Self:
        """Return the schema with the classes `names` added behind those it has."""
        classes = tuple(dict.fromkeys((*self.metadata.classes, *names)))
        if classes == self.metadata.classes:
            return self
        return replace(self, metadata=replace(self.metadata, classes=classes))

    def to_json(self) -> dict[str, Any]:
        """Return the schema as it stands in a store's attributes."""
        said = {
            "kind": self.kind,
            "tensors": {t.name: t.to_json() for t in self.tensors},
            "precision": self.precision,
            "granule": self.granule,
            "metadata": {**asdict(self.metadata), "classes": list(self.metadata.classes)},
        }
        # Stores of releases that had no choice do not say it, and their bytes stay as they are.
        chosen = {} if self.compression == "bitshuffle" else {"compression": self.compression}
        return said | chosen

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
            TensorColumn.from_json(name, _dict(t)) for name, t in _dict(data["tensors"]).items()
        )
        known = _dict(data["metadata"])
        metadata = Metadata(**{**known, "classes": tuple(_list(known["classes"]))})
        compression = data.get("compression", "bitshuffle")
        about = (data["kind"], tensors, data["precision"], data["granule"], metadata)
        return cls(*about, compression, True)

    def describe(self) -> str:
        """Return kind and shapes in one line, for messages."""
        return f"{self.kind}: {', '.join(column.describe() for column in self.tensors)}"


def _clip_column(shape: tuple[int, ...]) -> TensorColumn:
    dims = {1: ("clip_feature",), 2: ("clip_token", "clip_feature")}
    if len(shape) not in dims:
        raise SchemaMismatchError(
            f"clip: expected a shape (768,) or (77, 768), got {tuple(shape)!r}"
        )
    return TensorColumn("clip", tuple(shape), dims[len(shape)])


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {shown(value)}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {shown(value)}")
    return value
