"""Features of pictures by a vision model, by which sets of them are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedgfe_store.common.extra import extra
from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import choose_device, enough_memory, less_memory
from fedgfe_store.models.loading import naming, quiet_loading, refuse_incomplete

INCEPTION = "6726825d"
"""How the SHA-256 of the Inception weights begins by which FID is defined: those of TensorFlow's
graph of 2015-12-05, as pytorch-fid and torch-fidelity publish them under a name that ends so."""


@dataclass(frozen=True)
class Features:
    """A loaded feature extractor.

    Parameters
    ----------
    name : str
        What it is: ``dinov2``, ``clip``, ``inception``.
    embed : callable
        Gives features of RGB pictures, float32 ``[pictures, features]``.
    """

    name: str
    embed: Callable[[Sequence[Image.Image]], np.ndarray]

    @property
    def frechet(self) -> str:
        """What the Frechet distance of these features is called; only Inception's is FID."""
        return "FID" if self.name == "inception" else f"Frechet distance ({self.name})"


def load_features(path: Path, device: str | None = None) -> Features:
    """Load a feature extractor in float32; nothing is downloaded.

    Parameters
    ----------
    path : Path
        The folder of a vision model of transformers with its image processor, such as DINOv2, CLIP,
        SigLIP or ViT, of which the pooled output is taken; or the file of the standard Inception
        weights, ``weights-inception-2015-12-05-6726825d.pth`` (extra ``fid``).
    device : str, optional
        By default a GPU where there is one.

    Raises
    ------
    NotFoundError
        If there is no such model, a file of it is missing, or the extra is not installed.
    SchemaMismatchError
        If it is no vision model, lacks weights, or a file that is not those Inception weights.
    """
    device = choose_device(device)
    with enough_memory(f"loading the model {path} onto {device}", less_memory(device)):
        if path.is_dir():
            return _vision_model(path, device)
        if path.is_file():
            return _inception(path, device)
    raise NotFoundError(
        f"features {path}: expected the folder of a vision model of transformers, or the file of "
        f"Inception's weights; there is nothing"
    )


def _vision_model(folder: Path, device: str) -> Features:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    with naming(f"features {folder}: expected a vision model of transformers"), quiet_loading():
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        model, found = AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        # Pillow's resizing is the same on every machine, with torchvision and without.
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    refuse_incomplete(f"features {folder}", found)
    vision = getattr(model, "vision_model", model).to(device).eval()
    unable = f"features {folder} ({kind})"

    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        with _few_enough(len(images), device), naming(f"{unable} cannot embed"):
            inputs = processor(images=list(images), return_tensors="pt").to(device)
            with torch.inference_mode():
                pooled = vision(**inputs).pooler_output
        if pooled is None:
            raise SchemaMismatchError(f"{unable}: expected a model with a pooled output, got none")
        values: np.ndarray = pooled.float().cpu().numpy()
        return values

    return Features(str(kind), embed)


def _inception(file: Path, device: str) -> Features:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not found.startswith(INCEPTION):
        raise SchemaMismatchError(
            f"features {file}: expected the Inception weights by which FID is defined (SHA-256 "
            f"{INCEPTION}...), got a file of {found[:8]}...; other models are transformers' folders"
        )
    module: Any = extra("torch_fidelity.feature_extractor_inceptionv3", "FID", "fid")
    with naming(f"features {file}"):
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
        )
    network = network.to(device).eval()

    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        with _few_enough(len(images), device), torch.inference_mode():
            # One by one: their sizes may differ, and the network scales them by its own rule.
            rows = [network(_pixels(image).to(device))[0].float().cpu() for image in images]
            values: np.ndarray = torch.cat(rows).numpy()
        return values

    return Features("inception", embed)


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def _few_enough(images: int, device: str) -> Any:
    smaller = "a smaller --batch-size" if images > 1 else ""
    return enough_memory(f"embedding {images} pictures on {device}", less_memory(device, smaller))
