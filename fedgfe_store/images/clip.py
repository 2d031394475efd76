"""A CLIP model of transformers: images and texts as unit vectors in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import (
    choose_device,
    enough_memory,
    first_line,
    is_out_of_memory,
    less_memory,
)
from fedgfe_store.models.files import find_weights, read_json
from fedgfe_store.models.loading import naming, quiet_loading, refuse_incomplete

# What transformers reads of a model's folder.
_JSON = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class Clip:
    """A loaded model with its processor, both as transformers makes them."""

    def __init__(self, model: Any, processor: Any, *, name: str, device: str) -> None:
        self._model, self._processor, self._device = model, processor, device
        self._unable = f"model {name} cannot embed"

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
        doing = f"loading the model {name} onto {device}"
        with enough_memory(doing, less_memory(device)), quiet_loading():
            _check_kind(name)
            model, processor = _load(name)
            return cls(model.to(device).eval(), processor, name=name, device=device)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax makes shares of them."""
        return float(self._model.logit_scale.detach().exp())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Give unit vectors of texts, float32 ``[texts, feature]`` on the CPU."""
        doing = f"embedding {len(texts)} prompts on {self._device}"
        with enough_memory(doing, less_memory(self._device)), naming(self._unable):
            inputs = self._processor(
                text=list(texts), return_tensors="pt", padding=True, truncation=True
            )
            pooled = self._model.text_model(**inputs.to(self._device)).pooler_output
            return _unit(self._model.text_projection(pooled))

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Give unit vectors of RGB images, float32 ``[images, feature]`` on the CPU."""
        doing = f"embedding {len(images)} pictures on {self._device}"
        smaller = "a smaller --batch-size" if len(images) > 1 else ""
        with (
            enough_memory(doing, less_memory(self._device, smaller)),
            naming(self._unable),
        ):
            inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
            pooled = self._model.vision_model(**inputs).pooler_output
            return _unit(self._model.visual_projection(pooled))


def _check_kind(name: str) -> None:
    """Refuse what transformers would load as a CLIP of random weights."""
    from transformers import CLIPConfig

    folder = Path(name)
    if not folder.is_dir() and "/" not in name:
        raise _not_found(name, "there is no such folder")
    if folder.is_dir():
        for file in filter(Path.is_file, map(folder.joinpath, _JSON)):
            read_json(file)
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
    vocabularies = [folder / file for file in ("tokenizer.json", "vocab.json")]
    if folder.is_dir() and not any(map(Path.is_file, vocabularies)):
        raise _not_found(name, "it has neither tokenizer.json nor vocab.json")


def _load(name: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

    place, weights = _place(name), find_weights(Path(name), "model")
    weights.parameters()  # refuses files that are not whole
    try:
        model, found = CLIPModel.from_pretrained(
            name,
            dtype=torch.float32,
            variant=weights.variant,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **place,
        )
        images = _image_processor().from_pretrained(name, **place)
        tokenizer = CLIPTokenizer.from_pretrained(name, **place)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _not_found(name, first_line(error)) from error
    refuse_incomplete(f"model {name}", found)
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
