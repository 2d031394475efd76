"""A CLAP model of transformers: sounds and texts as unit vectors in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fedgfe_store.errors import NotFoundError, SchemaMismatchError
from fedgfe_store.models.devices import choose_device, enough_memory, less_memory
from fedgfe_store.models.loading import naming, quiet_loading, refuse_incomplete


class Clap:
    """A loaded model with its processors, as transformers makes them."""

    def __init__(
        self, model: Any, tokenizer: Any, extractor: Any, *, name: str, device: str
    ) -> None:
        self._model, self._tokenizer, self._extractor = model, tokenizer, extractor
        self._unable, self._device = f"audio model {name} cannot embed", device

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> Self:
        """Load a model in float32; nothing is downloaded.

        Parameters
        ----------
        folder : Path
            The folder of a CLAP of transformers with its processor.
        device : str, optional
            By default a GPU where there is one.

        Raises
        ------
        NotFoundError
            If there is no such folder, or a file of it is missing.
        SchemaMismatchError
            If it is no CLAP, or lacks weights.
        """
        from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, ClapModel

        if not folder.is_dir():
            raise NotFoundError(
                f"audio model {folder}: expected the folder of a CLAP; there is none"
            )
        # Without these, transformers would make a tokenizer that knows no word.
        if not any(map(Path.is_file, (folder / "tokenizer.json", folder / "vocab.json"))):
            raise NotFoundError(
                f"audio model {folder}: it has neither tokenizer.json nor vocab.json"
            )
        device = choose_device(device)
        what = f"audio model {folder}: expected a CLAP of transformers"
        with enough_memory(f"loading the model {folder} onto {device}", less_memory(device)):
            with naming(what), quiet_loading():
                kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
                if kind != "clap":
                    raise SchemaMismatchError(f"{what}, got {kind}")
                model, found = ClapModel.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
            refuse_incomplete(f"audio model {folder}", found)
            model = model.to(device).eval()
        return cls(model, tokenizer, extractor, name=str(folder), device=device)

    @property
    def rate(self) -> int:
        """Samples per second of the sounds that it takes."""
        return int(self._extractor.sampling_rate)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax makes shares of them."""
        return float(self._model.logit_scale_a.detach().exp())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Give unit vectors of texts, float32 ``[texts, feature]`` on the CPU."""
        with naming(self._unable):
            inputs = self._tokenizer(
                list(texts), return_tensors="pt", padding=True, truncation=True
            )
            return _unit(self._model.get_text_features(**inputs.to(self._device)))

    @torch.inference_mode()
    def embed_sounds(self, sounds: Sequence[np.ndarray]) -> torch.Tensor:
        """Give unit vectors of sounds at `rate`, float32 ``[sounds, feature]`` on the CPU."""
        doing = f"embedding {len(sounds)} sounds on {self._device}"
        smaller = "a smaller --batch-size" if len(sounds) > 1 else ""
        with enough_memory(doing, less_memory(self._device, smaller)), naming(self._unable):
            # Each by itself: of several, the extractor of models with fusion calls one longer than
            # it is, by chance.
            inputs = [
                self._extractor(sound, sampling_rate=self.rate, return_tensors="pt")
                for sound in sounds
            ]
            together = {
                name: torch.cat([each[name] for each in inputs]).to(self._device)
                for name in inputs[0]
            }
            return _unit(self._model.get_audio_features(**together))


def _unit(output: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(output.pooler_output, dim=-1).cpu()
