"""Train a tiny CLIP on pictograms, to measure the demo: ``python tools/train_tiny_clip.py FOLDER``.

It sees freshly drawn pictograms only, never a generated image: what it says of the demo's images
is not what it was trained on. Pictures are blurred, mixed with noise and with one another by
chance, so that it is unsure of what is unclear.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from generation_fakes import letters

from fedgfe_store.demo.pictograms import CLASSES, draw
from fedgfe_store.images.scoring import class_prompts

SIZE, TOKENS, BATCH = 64, 48, 60


def tiny_clip() -> CLIPModel:
    """Make a CLIP of two small transformers, of random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **sizes,
        vocab_size=54,
        num_hidden_layers=1,
        max_position_embeddings=TOKENS,
        bos_token_id=52,
        eos_token_id=53,
    )
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIZE, patch_size=8)
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    return CLIPModel(CLIPConfig(**both, projection_dim=32))


def picture(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw a pictogram, and spoil it by chance: blurred, over another one, or noisy."""
    drawn = draw(name, size=SIZE, rng=rng)
    if rng.random() < 0.5:
        other = draw(CLASSES[rng.integers(len(CLASSES))], size=SIZE, rng=rng)
        drawn = Image.blend(drawn, other, float(rng.uniform(0, 0.4)))
    if rng.random() < 0.5:
        drawn = drawn.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 3))))
    noise = rng.normal(0, rng.uniform(0, 30), (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(drawn) + noise).clip(0, 255).astype(np.uint8))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=600, show_default=True)
def main(folder: Path, steps: int) -> None:
    """Train it and save it in FOLDER as transformers does."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size)
    processor = CLIPProcessor(images, letters(folder, TOKENS))
    prompts = processor(
        text=list(class_prompts(CLASSES).values()), return_tensors="pt", padding=True
    )
    model = tiny_clip()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        classes = rng.integers(len(CLASSES), size=BATCH)
        pixels = processor(images=[picture(CLASSES[c], rng) for c in classes], return_tensors="pt")[
            "pixel_values"
        ]
        logits = model(**prompts, pixel_values=pixels).logits_per_image
        wanted = torch.from_numpy(classes)
        loss = functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            right = (logits.argmax(1) == wanted).float().mean()
            click.echo(f"step {step + 1}: loss {loss:.3f}, {right:.0%} right")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
