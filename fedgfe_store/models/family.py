"""A family of image models, as a short table declares it: which pipeline, under which columns."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self, get_args

import xxhash

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.column import Column, ColumnKind, MaskDtype
from fedgfe_store.models.encoding import Encoding

Latents = Literal["plain", "packed", "patched", "framed", "own"]
"""How a denoiser holds an image, see ``families.toml``."""

Negatives = Literal["none", "zeros", "rows"]
"""What guidance leads away from."""

_TABLE = Path(__file__).with_name("families.toml")


@dataclass(frozen=True)
class Variant:
    """What is otherwise where a configuration says so.

    Parameters
    ----------
    when : mapping
        Values by ``part.key``; all have to be there.
    steps : int, optional
        Denoising steps then.
    guidance : float or False, optional
        Guidance scale then; False for a model that takes none.
    negatives : {"none", "zeros", "rows"}, optional
        What guidance leads away from then.
    """

    when: Mapping[str, Any]
    steps: int | None = None
    guidance: float | Literal[False] | None = None
    negatives: Negatives | None = None

    def is_of(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a model's configurations are as this says."""
        for name, value in self.when.items():
            part, _, key = name.partition(".")
            if configs.get(part, {}).get(key) != value:
                return False
        return True


@dataclass(frozen=True)
class Family:
    """A family of image models.

    Parameters
    ----------
    name : str
        Such as ``"flux"``; what a store's `Schema.kind` names and ``--diffusion-type`` takes.
    title : str
        What people call it.
    pipelines : tuple of str
        Classes of diffusers that ``model_index.json`` may name.
    denoiser : str
        Name of the denoising network in the pipeline.
    columns : tuple of Column
        What it is conditioned on, in the order of the table.
    latents : {"plain", "packed", "patched", "framed", "own"}
        How the denoiser holds an image.
    steps : int
        Denoising steps when none are asked for.
    guidance : float or None
        Guidance scale when none is asked for; None for a model that takes none.
    size : int or str
        Width and height when none are asked for, in latents, or the key that says so.
    step : int or str
        Latents that width and height are multiples of, or the key that says so.
    guidance_argument : str
        Which argument the guidance scale is.
    embedded : str
        Key that says whether the denoiser embeds the scale; empty where that is no question.
    negatives : {"none", "zeros", "rows"}
        What guidance leads away from.
    above : float
        Guidance scale from which on it leads away from something.
    unless : str
        Key of a network that embeds the scale and needs no negatives then.
    apart : bool
        Whether negatives are denoised by themselves and may have another length.
    features, blocks : tuple of str
        Keys whose product is the denoiser's width, and whose sum is the number of its blocks;
        none of a U-Net, which has ``block_out_channels``.
    upcast : bool
        Whether the decoder computes in float32 where the rest is float16 and its configuration has
        ``force_upcast``.
    float32_latents : bool
        Whether the pipeline keeps latents in float32 whatever it computes in.
    call : mapping
        What the pipeline is always called with.
    encoders : mapping
        Class of transformers of each text encoder.
    encode : Encoding
        How the pipeline encodes prompts with them.
    variants : tuple of Variant
        What is otherwise of some models.
    model : str
        Model that is used when none is asked for.
    source : str or None
        Where it is declared, if not in this package.
    digest : str or None
        xxh3 of that declaration's content, 16 hex digits.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    denoiser: str
    columns: tuple[Column, ...]
    latents: Latents
    steps: int
    guidance: float | None
    size: int | str
    step: int | str = 1
    guidance_argument: str = "guidance_scale"
    embedded: str = ""
    negatives: Negatives = "none"
    above: float = 1.0
    unless: str = ""
    apart: bool = False
    features: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    upcast: bool = False
    float32_latents: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)
    encode: Encoding = field(default_factory=Encoding)
    variants: tuple[Variant, ...] = ()
    model: str = ""
    source: str | None = None
    digest: str | None = None

    @property
    def sequence(self) -> Column:
        """The first column, a sequence of tokens whose length masks share."""
        return self.columns[0]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Tokenizers of the text encoders, named as theirs."""
        return tuple(part.replace("text_encoder", "tokenizer") for part in self.encoders)

    def of(self, configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return the family as it is of a model with these configurations, by part."""
        found: Self = self
        for variant in self.variants:
            if variant.is_of(configs):
                steps = found.steps if variant.steps is None else variant.steps
                scale = found.guidance if variant.guidance is None else variant.guidance
                found = replace(
                    found,
                    steps=steps,
                    guidance=None if scale is False else scale,
                    negatives=variant.negatives or found.negatives,
                )
        return found


@cache
def families() -> Mapping[str, Family]:
    """Read the table of families, by name."""
    with _TABLE.open("rb") as file:
        return {name: _read(name, table, None) for name, table in tomllib.load(file).items()}


def read_family(path: str | Path) -> Family:
    """Read a file that declares one family, in the form of ``families.toml``.

    Raises
    ------
    NotFoundError
        If there is no such file.
    SchemaMismatchError
        If it is no TOML, or declares something else: which line of it, and what is expected.
    """
    path = Path(os.path.expanduser(path))
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise NotFoundError(f"family: expected a file {path}, got {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SchemaMismatchError(f"family: expected TOML in {path}, got {error}") from None
    if len(content) != 1 or not isinstance(next(iter(content.values())), dict):
        got = ", ".join(content) or "nothing"
        raise SchemaMismatchError(f"family {path}: expected one table, such as [mine], got {got}")
    ((name, table),) = content.items()
    # What it says, not how: comments and order may change.
    said = json.dumps(content, sort_keys=True, default=str).encode()
    family = _read(name, table, str(path.resolve()))
    return replace(family, digest=xxhash.xxh3_64_hexdigest(said))


class _Table:
    """A table of a declaration, which tells what is wrong with it by where it stands."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise SchemaMismatchError(f"{where}: expected a table, got {values!r}")
        self._left, self.where = dict(values), where

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, kind: type | tuple[type, ...], what: str, *default: Any) -> Any:
        """Take a value out; without a default it has to be there."""
        if key not in self._left and default:
            return default[0]
        got = self._left.pop(key, None)
        if not isinstance(got, kind) or (isinstance(got, bool) and kind in (int, (int, str))):
            raise SchemaMismatchError(f"{self.where}: expected {what} as {key}, got {got!r}")
        return got

    def names(self, key: str, *, least: int = 0) -> tuple[str, ...]:
        """Take a list of names out."""
        got = self.take(key, list, "a list of names", [])
        if len(got) < least or not all(isinstance(name, str) and name for name in got):
            raise SchemaMismatchError(f"{self.where}: expected names as {key}, got {got!r}")
        return tuple(got)

    def choice(self, key: str, known: tuple[str, ...], *default: str) -> Any:
        """Take one of some words out."""
        what = f"{', '.join(known[:-1])} or {known[-1]}"
        got = self.take(key, str, what, *default)
        if got not in known:
            raise SchemaMismatchError(f"{self.where}: expected {what} as {key}, got {got!r}")
        return got

    def scale(self, key: str, *default: Any) -> Any:
        """Take a guidance scale out: a finite number, or false."""
        got = self.take(key, (int, float), "a number or false", *default)
        if got is True or (got is not None and not isfinite(got)):
            raise SchemaMismatchError(
                f"{self.where}: expected a number or false as {key}, got {got!r}"
            )
        return got if got is None or got is False else float(got)

    def table(self, key: str, *default: Any) -> _Table:
        """Take a table out."""
        return _Table(self.take(key, dict, "a table", *default), f"{self.where}.{key}")

    def rest(self) -> dict[str, Any]:
        """Take everything out."""
        rest, self._left = self._left, {}
        return rest

    def end(self) -> None:
        """Refuse what nothing has taken."""
        if self._left:
            raise SchemaMismatchError(
                f"{self.where}: expected no {next(iter(self._left))!r}; docs/models.md lists "
                "what a declaration may say"
            )


def _read(name: str, values: object, source: str | None) -> Family:
    table = _Table(values, f"family {source or ''}[{name}]")
    guidance, defaults = table.table("guidance", {}), table.table("defaults")
    scale, columns = defaults.scale("guidance", False), _columns(table.table("columns"))
    family = Family(
        name=name,
        title=table.take("title", str, "text", name),
        pipelines=table.names("pipelines", least=1),
        model=table.take("model", str, "a model", ""),
        denoiser=table.take("denoiser", str, "the name of a part", "transformer"),
        latents=table.choice("latents", get_args(Latents), "own"),
        step=table.take("step", (int, str), "a number or a key", 1),
        size=table.take("size", (int, str), "a number or a key", 128),
        features=table.names("features"),
        blocks=table.names("blocks"),
        upcast=table.take("upcast", bool, "true or false", False),
        float32_latents=table.take("float32_latents", bool, "true or false", False),
        call=table.table("call", {}).rest(),
        encoders=table.table("encoders", {}).rest(),
        encode=_encoding(table.table("encode", {}), columns),
        columns=columns,
        guidance_argument=guidance.take("argument", str, "an argument", "guidance_scale"),
        embedded=guidance.take("embedded", str, "a key", ""),
        negatives=guidance.choice("negatives", get_args(Negatives), "none"),
        above=guidance.scale("above", 1.0),
        unless=guidance.take("unless", str, "a key", ""),
        apart=guidance.take("apart", bool, "true or false", False),
        steps=defaults.take("steps", int, "a whole number"),
        guidance=None if scale is False else scale,
        variants=_variants(table.take("variants", list, "a list of tables", []), name),
        source=source,
    )
    for part in (guidance, defaults, table):
        part.end()
    return family


def _columns(table: _Table) -> tuple[Column, ...]:
    found = []
    for argument, values in table.rest().items():
        one = _Table(values, f"{table.where}.{argument}")
        kind = one.choice("is", get_args(ColumnKind))
        mask = kind in ("mask", "lengths")
        width = one.take("width", (int, str), "a number or a key", *([""] if mask else []))
        dtype = one.choice("dtype", get_args(MaskDtype), "int64")
        first = one.take("first", bool, "true or false", False)
        found.append(Column(argument, kind, width, one.names("also"), dtype, first))
        one.end()
    if not found or found[0].kind != "sequence":
        got = found[0].kind if found else "none"
        raise SchemaMismatchError(f"{table.where}: expected a sequence first, got {got}")
    return tuple(found)


def _encoding(table: _Table, columns: tuple[Column, ...]) -> Encoding:
    known = [column.argument for column in columns]
    returns = table.take("returns", list, "a list of arguments", known)
    for name in returns:
        if not isinstance(name, str) or (name and name.removeprefix("negative_") not in known):
            raise SchemaMismatchError(
                f"{table.where}: expected {', '.join(known)}, negative_... or an empty text in "
                f"returns, got {name!r}"
            )
    found = Encoding(
        returns=tuple(returns),
        arguments=table.table("arguments", {}).rest(),
        length=table.take("length", str, "an argument", ""),
        besides=table.take("besides", int, "a whole number", 0),
    )
    table.end()
    return found


def _variants(tables: list[Any], name: str) -> tuple[Variant, ...]:
    found = []
    for number, values in enumerate(tables):
        one = _Table(values, f"family [{name}], variant {number + 1}")
        when = one.table("when").rest()
        steps = one.take("steps", int, "a whole number", None)
        negatives = one.choice("negatives", get_args(Negatives)) if "negatives" in one else None
        found.append(Variant(when, steps, one.scale("guidance", None), negatives))
        one.end()
    return tuple(found)
