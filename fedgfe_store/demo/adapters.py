"""The adapter that a node trains: from a clip's log-mel features to T5 and CLIP embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgfe_store.demo.anchors import CLIP_SHAPE, T5_SHAPE
from fedgfe_store.demo.sounds import MEL_BANDS

RANK = 16
"""Numbers that an embedding of 70,400 is made from."""


class Adapter(nn.Module):
    """Two convolutions, a layer that reduces to `RANK` numbers, and one that spreads them out.

    Its outputs have zero mean and unit variance in each token, as text encoders end in a
    normalization.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listen = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.reduce = nn.Linear(2 * 32 * MEL_BANDS // 4, RANK)
        self.t5 = nn.Linear(RANK, math.prod(T5_SHAPE))
        self.clip = nn.Linear(RANK, math.prod(CLIP_SHAPE))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Parameters
        ----------
        features : torch.Tensor
            float32 [n, MEL_BANDS, frames], as `fedgfe_store.demo.sounds.log_mel` gives them.

        Returns
        -------
        t5 : torch.Tensor
            float32 [n, 17, 4096].
        clip : torch.Tensor
            float32 [n, 768].
        """
        heard: Tensor = self.listen(features[:, None])
        # When something sounds does not matter, only how loud it is at most and on average.
        summary = torch.cat([heard.mean(dim=3), heard.amax(dim=3)], dim=1).flatten(1)
        code = functional.layer_norm(self.reduce(summary), [RANK])
        t5 = functional.layer_norm(self.t5(code).unflatten(1, T5_SHAPE), T5_SHAPE[1:])
        return t5, functional.layer_norm(self.clip(code), CLIP_SHAPE)
