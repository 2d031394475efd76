"""A CLIP model of transformers: pictures and texts as unit vectors in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.generation.devices import choose_device
from fedgfe_store.generation.pipelines import quiet_loading


class Clip:
    """A loaded model with its processor, both as transformers makes them."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model, self._processor, self._device = model, processor, device

    @classmethod
    def load(cls, name: str, device: str | None = None) -> Self:
        """Load a model in float32.

        Parameters
        ----------
        name : str
            Its folder, which needs no network, or its name on the hub.
        device : str, optional
            By default a GPU where there is one.

        Raises
        ------
        NotFoundError
            If there is no such model, or a file of it is missing.
        SchemaMismatchError
            If it is no CLIP, or lacks weights.
        """
        device = choose_device(device)
        with quiet_loading():
            _check_kind(name)
            model, processor = _load(name)
        return cls(model.to(device).eval(), processor, device)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Give unit vectors of texts, float32 ``[texts, feature]`` on the CPU."""
        inputs = self._processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True
        )
        pooled = self._model.text_model(**inputs.to(self._device)).pooler_output
        return _unit(self._model.text_projection(pooled))

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Give unit vectors of RGB pictures, float32 ``[pictures, feature]`` on the CPU."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        pooled = self._model.vision_model(**inputs).pooler_output
        return _unit(self._model.visual_projection(pooled))


def _check_kind(name: str) -> None:
    """Refuse what transformers would load as a CLIP of random weights."""
    from transformers import CLIPConfig

    try:
        config, _ = CLIPConfig.get_config_dict(name, **_place(name))
    except OSError as error:
        raise _not_found(name, error) from error
    if not config:
        raise _not_found(name, "it has no config.json")
    if config.get("model_type") != "clip":
        kind = config.get("model_type") or config.get("_class_name")
        raise SchemaMismatchError(f"model {name}: expected a clip, got {kind}")
    # Without these, transformers would make a tokenizer that knows no word.
    vocabularies = [Path(name) / file for file in ("tokenizer.json", "vocab.json")]
    if Path(name).is_dir() and not any(map(Path.is_file, vocabularies)):
        raise _not_found(name, "it has neither tokenizer.json nor vocab.json")


def _load(name: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

    place = _place(name)
    try:
        model, info = CLIPModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **place
        )
        images = _image_processor().from_pretrained(name, **place)
        tokenizer = CLIPTokenizer.from_pretrained(name, **place)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_found(name, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise SchemaMismatchError(f"model {name}: expected all weights, got none of {missing}")
    return model, CLIPProcessor(images, tokenizer)


def _place(name: str) -> dict[str, bool]:
    return {"local_files_only": Path(name).is_dir()}


def _not_found(name: str, reason: object) -> NotFoundError:
    first = next(iter(str(reason).strip().splitlines()), "")
    return NotFoundError(
        f"model {name}: expected the folder of a CLIP of transformers with its processor, or its "
        f"name on the hub ({first})"
    )


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1).cpu()


def _image_processor() -> Any:
    """Give the processor that resizes with Pillow: scores do not depend on torchvision then."""
    import transformers

    # Earlier versions have it under the name that is torchvision's now.
    pillow = getattr(transformers, "CLIPImageProcessorPil", None)
    return pillow or transformers.CLIPImageProcessor
