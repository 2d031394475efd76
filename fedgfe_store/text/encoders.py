"""Text encoders: loaded for a few prompts through diffusers' own pipeline, then dropped."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from numpy.typing import NDArray

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import DTYPES, clear_cache, enough_memory
from fedgfe_store.models.files import digest_files, read_json
from fedgfe_store.models.fit import Footprint
from fedgfe_store.models.loading import load_part, load_pipeline, naming, quiet_loading
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Offload, Placement
from fedgfe_store.text.columns import as_arrays, config_number

BATCH_TOKENS = 4096
"""Tokens, padding included, that the encoders get at once; it bounds memory."""

OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")
"""Offload modes that diffusers has for encoders; it moves a denoising network's blocks alone."""

# A few prompts can be waited for.
_OTHERWISE = "--device cpu or a GPU with more free memory"

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


def default_length(model: Model) -> int:
    """Give the tokens of a sequence that the model's pipeline has where none are asked for.

    Raises
    ------
    SchemaMismatchError
        If the family declares an argument for it that the pipeline does not have.
    """
    import diffusers

    with quiet_loading():
        pipeline = getattr(diffusers, model.pipeline_class)
    name = model.family.encode.length
    usual = inspect.signature(pipeline.__call__).parameters.get(name)
    own = inspect.signature(pipeline.encode_prompt).parameters.get(name)
    found = _default(usual, own) if own is not None else None
    if not isinstance(found, int):
        raise SchemaMismatchError(
            f"family {model.kind}: expected the argument for a sequence's tokens as length, which "
            f"{model.pipeline_class}.encode_prompt has a number for, got {name!r}"
        )
    return found


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
        block=weights // config_number(model, larger, layers),
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
        with enough_memory(doing, placement.remedy(OFFLOADS, otherwise=_OTHERWISE)):
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
        self,
        prompts: Sequence[str],
        *,
        tokens: int = 512,
        clip_sequence: bool = False,
        negative: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """Encode prompts exactly as diffusers does where a pipeline is called with them.

        Parameters
        ----------
        prompts : sequence of str
            The prompts.
        tokens : int
            Length of the sequences, of all but CLIP's.
        clip_sequence : bool
            FLUX: give CLIP's last hidden state rather than the pooled vector.
        negative : bool
            Whether they are what guidance leads away from, which some pipelines encode otherwise.

        Returns
        -------
        dict of str to ndarray
            By the pipeline's argument, float32, exactly the encoders' values: for FLUX
            ``prompt_embeds`` ``[n, tokens, 4096]`` and ``pooled_prompt_embeds`` ``[n, 768]`` (or
            ``[n, 77, 768]``). Masks are bool ``[n, tokens]``; shorter sequences that a mask goes
            with are padded with zeros.

        Raises
        ------
        SchemaMismatchError
            If the pipeline returns something else than its declaration says.
        """
        doing = self._placement.describe(f"encoding {len(prompts)} prompts")
        unable = f"model {self._model.folder} cannot encode"
        remedy = self._placement.remedy(OFFLOADS, otherwise=_OTHERWISE)
        with enough_memory(doing, remedy), naming(unable), quiet_loading():
            values = self._encode(list(prompts), tokens, negative)
            if clip_sequence:
                values["pooled_prompt_embeds"] = self._sequence(list(prompts))
            return as_arrays(self._model, values, tokens)

    def _encode(self, prompts: list[str], tokens: int, negative: bool) -> dict[str, Any]:
        how, encode = self._model.family.encode, self._pipeline.encode_prompt
        apart = negative and any(name.startswith("negative_") for name in how.returns)
        takes = inspect.signature(encode).parameters
        usual = inspect.signature(type(self._pipeline).__call__).parameters
        # Some defaults of encoding alone are others than those of a call.
        given = {name: _default(usual.get(name), takes[name]) for name in takes}
        given |= how.arguments
        # A list of its own: one pipeline changes the one that it is given.
        given |= {"prompt": [""] * len(prompts) if apart else list(prompts)}
        given |= {"device": self._placement.device, "num_images_per_prompt": 1}
        given |= {"do_classifier_free_guidance": apart}
        given |= {"negative_prompt": prompts} if apart else {}
        given |= {how.length: tokens - how.besides} if how.length else {}
        known = {
            name: value
            for name, value in given.items()
            if name in takes and takes[name].kind is not inspect.Parameter.VAR_KEYWORD
        }
        returned = encode(**known)
        returned = returned if isinstance(returned, tuple) else (returned,)
        found = dict(zip(how.returns, returned, strict=False))
        start = "negative_" if apart else ""
        wanted = (column.argument for column in self._model.family.columns)
        return {name: found[start + name] for name in wanted if start + name in found}

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
        limits = list(self._limits(tokens))
        for prompt in prompts:
            for name, tokenizer, limit in limits:
                with naming(f"model {self._model.folder} cannot encode"), quiet_loading():
                    length = len(tokenizer(prompt).input_ids)
                if length > limit:
                    yield f"prompt {prompt!r}: {length} tokens of {name}, cut to {limit}"

    def _limits(self, tokens: int) -> Iterator[tuple[str, Any, int]]:
        """Give each tokenizer with what its encoder is called, and the tokens that it takes."""
        family = self._model.family
        for kind, part in zip(family.encoders.values(), family.tokenizers, strict=True):
            tokenizer = getattr(self._pipeline, part)
            # One family's takes images as well, and has that of texts inside.
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if kind.startswith("CLIP"):
                yield "CLIP", tokenizer, tokenizer.model_max_length
            else:
                name = "T5" if kind.startswith("T5") else kind
                yield name, tokenizer, tokens - family.encode.besides


def _default(usual: inspect.Parameter | None, own: inspect.Parameter | None) -> Any:
    """Give an argument's default in the pipeline's call, else in its encoding, else None."""
    for parameter in (usual, own):
        if parameter is not None and parameter.default is not inspect.Parameter.empty:
            return parameter.default
    return None


def _clip_sequence(pipeline: Any, prompts: list[str], device: str) -> torch.Tensor:
    values: torch.Tensor
    values, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return values
