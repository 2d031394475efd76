"""Where the tiny FLUX lies, and the settings that it is made for.

It is a FLUX pipeline without text encoders, trained by ``tools/train_tiny_flux.py`` to draw the
pictogram of a class from an embedding near the class's anchor, and an unclear one from an
embedding that is far from all of them.
"""

from __future__ import annotations

from pathlib import Path

TINY_FLUX = Path(__file__).parent / "tiny_flux"
"""Its folder, for `diffusers.FluxPipeline.from_pretrained`."""

TINY_SIZE = 64
"""Width and height in pixels of the pictures that it has learnt to draw."""

TINY_STEPS = 8
"""Denoising steps; more do not make the pictures better."""

TINY_GUIDANCE = 3.5
"""Guidance scale. It has learnt 1 to 10, where more makes unclear embeddings look clearer."""
