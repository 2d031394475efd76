"""Train a tiny CLAP on the demo's kind of sounds: ``python tools/train_tiny_clap.py FOLDER``.

It hears freshly made clips only, of rooms that no node of the demo has, never a clip of the demo:
what it says of these is not what it was trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn import functional
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from generation_fakes import letters

from fedgfe_store.demo.pictograms import CLASSES
from fedgfe_store.demo.sounds import SAMPLE_RATE, make_clip
from fedgfe_store.images.hearing import SOUND_PROMPT
from fedgfe_store.images.scoring import class_prompts

TOKENS, BATCH, ROOMS, CLIPS = 48, 50, 20, 8
WORDS = 54
"""Of the tokenizer; its last one ends a text and pads it."""


def tiny_clap() -> ClapModel:
    """Make a CLAP of two small transformers, of random weights."""
    text = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        # Positions are counted from the number of the token that pads.
        "max_position_embeddings": WORDS + TOKENS,
        "pad_token_id": WORDS - 1,
        "eos_token_id": WORDS - 1,
        "bos_token_id": WORDS - 2,
    }
    audio = {
        "spec_size": 64,
        "num_mel_bins": 32,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 32,
        "hidden_size": 64,
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "num_hidden_layers": 2,
        "window_size": 4,
        "hidden_dropout_prob": 0.0,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=32))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=400, show_default=True)
def main(folder: Path, steps: int) -> None:
    """Train it and save it in FOLDER as transformers does."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    extractor = ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=SAMPLE_RATE,
        hop_length=SAMPLE_RATE // 64,
        max_length_s=1,
        fft_window_size=512,
        frequency_min=50,
        frequency_max=SAMPLE_RATE // 2,
        truncation="rand_trunc",
    )
    tokenizer = letters(folder, TOKENS)
    texts = list(class_prompts(CLASSES, SOUND_PROMPT).values())
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    click.echo(f"{len(CLASSES) * ROOMS * CLIPS} clips of {ROOMS} rooms")
    clips = [
        make_clip(name, node=f"room {room}", split="clap", index=index, seed=1)
        for name in CLASSES
        for room in range(ROOMS)
        for index in range(CLIPS)
    ]
    heard = extractor(clips, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
    heard = heard.float()
    wanted = torch.arange(len(CLASSES)).repeat_interleave(ROOMS * CLIPS)
    model = tiny_clap().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        chosen = torch.from_numpy(rng.integers(len(heard), size=BATCH))
        logits = model(**prompts, input_features=heard[chosen]).logits_per_audio
        loss = functional.cross_entropy(logits, wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            right = (logits.argmax(1) == wanted[chosen]).float().mean()
            click.echo(f"step {step + 1}: loss {loss:.3f}, {right:.0%} right")
    model.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
