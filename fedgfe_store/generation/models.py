"""Which image model is meant, and what is known of it before any weights are loaded."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fedgfe_store.demo.tiny import TINY_GUIDANCE, TINY_SIZE, TINY_STEPS, tiny_flux_path
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.schema import Schema

DEFAULT_MODEL = "black-forest-labs/FLUX.1-dev"
MODEL_VARIABLE = "FEDGFE_MODEL"

_PARTS = ("transformer", "vae", "scheduler")
_WEIGHTS = "diffusion_pytorch_model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_HUB_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class Model:
    """A FLUX model whose configuration has been read and whose weights have not.

    Parameters
    ----------
    name : str
        What it was asked for as: ``"tiny"``, a hub id, or the name of a local folder.
    folder : Path
        Where its files are; of a model of the hub, the cached snapshot.
    revision : str
        Commit of the hub, or a digest of the local files.
    transformer, vae : mapping
        Their configurations.
    from_hub : bool
        Whether missing weights can be fetched.
    """

    name: str
    folder: Path
    revision: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    from_hub: bool = False

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale has an effect; schnell-like models have none."""
        return bool(self.transformer["guidance_embeds"])

    @property
    def t5_width(self) -> int:
        """Features of a T5 token."""
        return int(self.transformer["joint_attention_dim"])

    @property
    def clip_width(self) -> int:
        """Features of the pooled CLIP vector."""
        return int(self.transformer["pooled_projection_dim"])

    @property
    def pixels_per_token(self) -> int:
        """Width of the square of pixels that one image token stands for."""
        return 2 * self.latent_scale

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one axis."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def default_steps(self) -> int:
        """Denoising steps when none are asked for."""
        if self.name == "tiny":
            return TINY_STEPS
        return 28 if self.takes_guidance else 4

    @property
    def default_guidance(self) -> float | None:
        """Guidance scale when none is asked for; None if the model takes none."""
        if not self.takes_guidance:
            return None
        return TINY_GUIDANCE if self.name == "tiny" else 3.5

    @property
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for; like diffusers, 128 latents."""
        return TINY_SIZE if self.name == "tiny" else 128 * self.latent_scale

    def check_schema(self, schema: Schema) -> None:
        """Make sure that a store's embeddings fit, before any weights are loaded.

        Raises
        ------
        SchemaMismatchError
            If not; both sides are shown.
        """
        t5, clip = schema.columns.get("t5"), schema.columns.get("clip")
        fits = (
            schema.kind == "flux"
            and t5 is not None
            and clip is not None
            and (len(t5), len(clip)) in ((2, 1), (2, 2))
            and (t5[-1], clip[-1]) == (self.t5_width, self.clip_width)
        )
        if not fits:
            raise SchemaMismatchError(
                f"embeddings for the model {self.name}: expected flux: t5 [tokens, "
                f"{self.t5_width}], clip [{self.clip_width}] or [tokens, {self.clip_width}], "
                f"got {schema.describe()}"
            )

    def parameters(self, part: str) -> int:
        """Count the parameters of ``"transformer"`` or ``"vae"`` from its weight files."""
        files = _weight_files(self.folder / part)
        return sum(_count_parameters(file) for file in files)

    def fetch_weights(self) -> None:
        """Download a hub model's weights where they are missing.

        Raises
        ------
        NotFoundError
            If they are neither here nor reachable.
        """
        if all(_weight_files(self.folder / part) for part in ("transformer", "vae")):
            return
        if not self.from_hub:
            raise NotFoundError(
                f"model {self.folder}: expected {_WEIGHTS}.safetensors in transformer and vae, "
                "got none or only some"
            )
        _download(self.name, [f"{part}/*" for part in _PARTS], revision=self.revision)


def resolve_model(name: str | None = None, *, stored: str | None = None) -> Model:
    """Find a model and read its configuration.

    Parameters
    ----------
    name : str, optional
        ``"tiny"``, a local folder, or a hub id. Without one the environment variable
        ``FEDGFE_MODEL`` counts, then `stored`, then FLUX.1-dev.
    stored : str, optional
        The model that the store names.

    Returns
    -------
    Model
        The model, without its weights.

    Raises
    ------
    NotFoundError
        If there is no such model, or if it is neither cached nor reachable: how to get it.
    SchemaMismatchError
        If it is there but not a FLUX text-to-image model.
    """
    name = name or os.environ.get(MODEL_VARIABLE) or stored or DEFAULT_MODEL
    folder = tiny_flux_path() if name == "tiny" else Path(name).expanduser()
    if name == "tiny" and not folder.is_dir():
        raise NotFoundError(
            f"model tiny: expected a folder {folder}, got none; reinstall fedgfe-store"
        )
    if folder.is_dir():
        known_as = (
            "tiny" if folder.resolve() == tiny_flux_path().resolve() else folder.resolve().name
        )
        transformer, vae = _read_configs(folder)
        return Model(known_as, folder, _digest_folder(folder), transformer, vae)
    if not _HUB_ID.fullmatch(name):
        raise NotFoundError(f"model: expected tiny, a folder or a hub id, got {name!r}")
    folder = _cached_snapshot(name) or _download(name, ["*.json"])
    transformer, vae = _read_configs(folder)
    return Model(name, folder, folder.name, transformer, vae, from_hub=True)


def _read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    pipeline = _read_json(folder / "model_index.json").get("_class_name")
    if pipeline != "FluxPipeline":
        raise SchemaMismatchError(f"model {folder}: expected a FluxPipeline, got {pipeline}")
    transformer = _read_json(folder / "transformer" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    if transformer["in_channels"] != 4 * vae["latent_channels"]:
        raise SchemaMismatchError(
            f"model {folder}: expected a text-to-image transformer of "
            f"{4 * vae['latent_channels']} input channels, got {transformer['in_channels']}"
        )
    return transformer, vae


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"model: expected a file {path}, got none") from None
    except ValueError as error:
        raise SchemaMismatchError(f"model: expected JSON in {path}, got {error}") from None
    if not isinstance(content, dict):
        raise SchemaMismatchError(f"model: expected a JSON object in {path}")
    return content


def _digest_folder(folder: Path) -> str:
    """Hash configurations, and sizes and samples of the weights: cheap, and any training shows."""
    digest = xxhash.xxh3_128()
    for path in sorted(p for part in _PARTS for p in (folder / part).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(b"".join(_samples(path)))
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for n in range(_SAMPLES):
            file.seek(n * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _weight_files(folder: Path) -> list[Path]:
    """List the files that the weights are loaded from; none if any is missing."""
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    names = {f"{_WEIGHTS}.safetensors"}
    if index.is_file():
        names = set(_read_json(index)["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


def _count_parameters(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = [t for name, t in header.items() if name != "__metadata__"]
    return sum(
        (t["data_offsets"][1] - t["data_offsets"][0]) // _ITEM_BYTES.get(t["dtype"], 4)
        for t in tensors
    )


def _cached_snapshot(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _download(name: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            etag_timeout=_HUB_TIMEOUT_SECONDS,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise NotFoundError(_how_to_get(name, str(error).strip().splitlines()[0])) from error
    return Path(folder)


def _how_to_get(name: str, reason: str) -> str:
    return (
        f"model {name}: expected a folder, or a model in the local cache or on the hub, got none "
        f"of them ({reason}).\n"
        f"Where there is a network: accept the licence on the model's page if it is gated, log in "
        f"with `hf auth login`, and run `hf download {name}` with HF_HOME set to a folder that "
        "this machine sees.\n"
        "`--model FOLDER` takes a local copy; `--model tiny` runs without any download."
    )
