"""Text encoders: loaded for a few prompts through diffusers' own pipeline, then dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedgfe_store.errors import NotFoundError
from fedgfe_store.models.devices import DTYPES, clear_cache, enough_memory
from fedgfe_store.models.files import check_number, digest_files, read_json
from fedgfe_store.models.fit import Footprint
from fedgfe_store.models.loading import load_part, load_pipeline, naming, quiet_loading
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Offload, Placement
from fedgfe_store.schema import Metadata, Schema

BATCH_TOKENS = 4096
"""Tokens, padding included, that the encoders get at once; it bounds memory."""

OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")
"""Offload modes that diffusers has for encoders; it moves a denoising network's blocks alone."""

# T5-XXL at 512 tokens: four hidden layers of 10,240 and two maps of attention of 64 heads.
_VALUES_PER_TOKEN = 4 * 10_240 + 2 * 64 * 512
_WHERE = {
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
}


def encoder_identity(model: Model) -> str | None:
    """Tell one set of text encoders from another; None where the model has none.

    Returns
    -------
    str or None
        ``name@commit`` for a model of the hub, 32 hex digits from the files of a local one.
    """
    if model.from_hub:
        return f"{model.name}@{model.revision}"
    if not all((model.folder / part).is_dir() for part in model.encoder_parts):
        return None
    return digest_files(model.folder, model.encoder_parts)


def check_encoders(model: Model, *, fetch: bool) -> None:
    """Make sure that a model has text encoders.

    Parameters
    ----------
    model : Model
        The model.
    fetch : bool
        Whether a hub model's encoders are downloaded where they are not here whole; else their
        configuration is enough.

    Raises
    ------
    NotFoundError
        If it has none, or they cannot be fetched.
    """
    missing = [part for part in model.encoder_parts if not (model.folder / part).is_dir()]
    if (fetch or missing) and model.from_hub and model.fetch(*model.encoder_parts):
        return
    if missing:
        raise NotFoundError(
            f"the model {model.name} has no text encoders: expected {', '.join(missing)} in "
            f"{model.folder}, got none; --model names one that has them, such as "
            f"{model.family.model}"
        )


def encoder_schema(
    model: Model, *, tokens: int, clip_sequence: bool, metadata: Metadata | None = None
) -> Schema:
    """Say what a model's text encoders give, from their configurations.

    Parameters
    ----------
    model : Model
        A model with text encoders.
    tokens : int
        Tokens of a T5 sequence; a CLIP sequence is as long as its tokenizer says.
    clip_sequence : bool
        FLUX: whether CLIP gives its sequence rather than the pooled vector.
    metadata : Metadata, optional
        Metadata of the schema.

    Raises
    ------
    NotFoundError
        If a configuration is not there.
    SchemaMismatchError
        If it does not tell the shape.
    """
    width = _number(model, "text_encoder", "hidden_size")
    length = _number(model, "tokenizer", "model_max_length", "tokenizer_config.json")
    if model.kind == "sd":
        return Schema.sd(length, width=width, metadata=metadata)
    clip = (length, width) if clip_sequence else (width,)
    t5_width = _number(model, "text_encoder_2", "d_model")
    return Schema.flux(tokens, width=t5_width, clip=clip, metadata=metadata)


def encoder_footprint(model: Model, item_bytes: int) -> Footprint:
    """Estimate the device memory of encoding from the weight files.

    The larger encoder takes the denoiser's place in the footprint, the smaller one the decoder's.
    """
    parts = [part for part in model.encoder_parts if part.startswith("text_encoder")]
    larger, *smaller = sorted(parts, key=model.parameters, reverse=True)
    layers = "num_layers" if "num_layers" in model.config(larger) else "num_hidden_layers"
    weights = model.parameters(larger) * item_bytes
    work = BATCH_TOKENS * _VALUES_PER_TOKEN * item_bytes
    return Footprint(
        denoiser=weights,
        vae=sum(map(model.parameters, smaller)) * item_bytes,
        block=weights // _number(model, larger, layers),
        denoising=work,
        decoding=work if smaller else 0,
    )


class TextEncoders:
    """The text encoders of a model, in memory until the block ends.

    Build it with `load` and use it as a context.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        The model's pipeline without denoising network and decoder, weights on the CPU.
    model : Model
        What it was loaded from.
    placement : Placement
        Where to encode; offload ``"model"`` keeps one encoder at a time on the device.
    """

    def __init__(self, pipeline: Any, model: Model, placement: Placement) -> None:
        self._pipeline: Any = pipeline
        self._model, self._placement = model, placement
        if placement.offload == "none":
            pipeline.to(placement.device)
        else:
            getattr(pipeline, _WHERE[placement.offload])(device=placement.device)

    @classmethod
    def load(cls, model: Model, placement: Placement) -> Self:
        """Load a model's text encoders and nothing else.

        Raises
        ------
        NotFoundError
            If a file is missing.
        SchemaMismatchError
            If a file is not what is expected, or memory is not enough.
        """
        dtype = DTYPES[placement.dtype]
        doing = placement.describe(f"loading the text encoders of {model.name}")
        with enough_memory(doing, placement.remedy(OFFLOADS)):
            encoders = {part: load_part(model, part, dtype) for part in model.family.encoders}
            for part in model.encoder_parts:
                for file in (model.folder / part).glob("tokenizer*.json"):
                    read_json(file)
            tokenizers = model.family.tokenizers
            pipeline = load_pipeline(model, dtype, encoders, keep=tokenizers, rest=": tokenizer")
            return cls(pipeline, model, placement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pipeline = None
        clear_cache(self._placement.device)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, tokens: int = 512, clip_sequence: bool = False
    ) -> dict[str, NDArray[np.float32]]:
        """Encode prompts exactly as diffusers does.

        Parameters
        ----------
        prompts : sequence of str
            The prompts.
        tokens : int
            FLUX: length of the T5 sequences, ``max_sequence_length``.
        clip_sequence : bool
            FLUX: give CLIP's last hidden state rather than the pooled vector.

        Returns
        -------
        dict of str to ndarray
            float32, exactly the encoders' values: for FLUX ``t5`` ``[n, tokens, 4096]`` and
            ``clip`` ``[n, 768]`` (or ``[n, 77, 768]``), for Stable Diffusion ``clip``
            ``[n, 77, 768]``.
        """
        doing = self._placement.describe(f"encoding {len(prompts)} prompts")
        unable = f"model {self._model.folder} cannot encode"
        remedy = self._placement.remedy(OFFLOADS)
        with enough_memory(doing, remedy), naming(unable), quiet_loading():
            values = self._encode(list(prompts), tokens, clip_sequence)
        return {name: value.float().cpu().numpy() for name, value in values.items()}

    def _encode(
        self, prompts: list[str], tokens: int, clip_sequence: bool
    ) -> dict[str, torch.Tensor]:
        device = self._placement.device
        if self._model.kind == "sd":
            return {"clip": _clip_sequence(self._pipeline, prompts, device)}
        t5, clip, _ = self._pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=tokens
        )
        return {"t5": t5, "clip": self._sequence(prompts) if clip_sequence else clip}

    def _sequence(self, prompts: list[str]) -> torch.Tensor:
        """Let Stable Diffusion's pipeline encode: it gives the sequence that FLUX's drops."""
        from diffusers import StableDiffusionPipeline

        parts = {"text_encoder": self._pipeline.text_encoder, "tokenizer": self._pipeline.tokenizer}
        pipeline = StableDiffusionPipeline(
            **dict.fromkeys(("unet", "vae", "scheduler", "safety_checker", "feature_extractor")),
            **parts,
            requires_safety_checker=False,
        )
        return _clip_sequence(pipeline, prompts, self._placement.device)

    def cut(self, prompts: Sequence[str], tokens: int) -> Iterator[str]:
        """Say in a line each which prompts are longer than an encoder takes."""
        tokenizer = self._pipeline.tokenizer
        limits = [("CLIP", tokenizer, tokenizer.model_max_length)]
        if self._model.kind == "flux":
            limits.append(("T5", self._pipeline.tokenizer_2, tokens))
        for prompt in prompts:
            for name, tokenizer, limit in limits:
                with naming(f"model {self._model.folder} cannot encode"), quiet_loading():
                    length = len(tokenizer(prompt).input_ids)
                if length > limit:
                    yield f"prompt {prompt!r}: {length} tokens of {name}, cut to {limit}"


def _clip_sequence(pipeline: Any, prompts: list[str], device: str) -> torch.Tensor:
    values: torch.Tensor
    values, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return values


def _number(model: Model, part: str, key: str, name: str = "config.json") -> int:
    config = model.config(part, name)
    check_number(config, key, str(model.folder / part / name))
    return int(config[key])
