"""Tiny text encoders of random weights: transformers' own classes, as wide as the real ones.

Tokenizers know letters, and the words that a pipeline itself puts before a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from string import ascii_letters, digits, punctuation
from typing import Any

import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

Parts = dict[str, Any]
_CHARACTERS = ascii_letters + digits + punctuation
_THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"""
_INSTRUCTING = """{% for message in messages %}
{%- if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]
{%- else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}
{%- endfor %}"""


def make(name: str) -> Parts:
    """Make text encoders and tokenizers of a family in `tiny_families`, in float32."""
    return _BUILDERS[name]()


def _clip(width: int, *, projected: bool = False) -> tuple[PreTrainedModel, CLIPTokenizer]:
    words = [letter + end for letter in _CHARACTERS for end in ("", "</w>")]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return _spread(kind(config)), CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Set the embeddings of tokens apart: some families take what a first layer is given."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
    return model


def _t5() -> tuple[PreTrainedModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in _CHARACTERS]
    config = T5Config(
        vocab_size=len(pieces),
        d_model=4096,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _gemma() -> Parts:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *_CHARACTERS]
    vocabulary = {word: number for number, word in enumerate(words)}
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=2304,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    return {"text_encoder": Gemma2Model(config), "tokenizer": tokenizer}


def _qwen_tokenizer(words: list[str], specials: tuple[str, ...], **options: Any) -> Qwen2Tokenizer:
    letters = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=2048, **options)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.add_tokens([AddedToken(word, special=True) for word in specials])
    return tokenizer


def _words(text: str) -> list[str]:
    """Return the words of a text with the space before each, as many tokenizers have them."""
    return sorted(set(re.findall(r" ?\w+", text)))


_TURNS = ("<|im_start|>", "<|im_end|>")


def _qwen3(kind: type[PreTrainedModel], layers: int) -> Parts:
    tokenizer = _qwen_tokenizer(
        ["user", "assistant", "<think></think>"], _TURNS, chat_template=_THINKING
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=2560,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    return {"text_encoder": _spread(kind(config)), "tokenizer": tokenizer}


def _qwen_image() -> Parts:
    # The pipeline drops the first 34 tokens: its own words, as the real tokenizer counts them.
    source = QwenImagePipeline.__init__.__code__.co_consts
    template = next(text for text in source if isinstance(text, str) and "<|im_start|>" in text)
    tokenizer = _qwen_tokenizer(_words(re.sub(r"<\|\w+\|>|{}", "", template)), _TURNS)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 3584,
            "intermediate_size": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 28,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [0],
        },
    )
    return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config), "tokenizer": tokenizer}


def _mistral() -> Parts:
    # The real part is a processor of images, too, and needs torchvision; this is its tokenizer.
    turns = ("[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
    tokenizer = _qwen_tokenizer(_words(SYSTEM_MESSAGE), turns, chat_template=_INSTRUCTING)
    config = Mistral3Config(
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=5120,
            intermediate_size=2,
            num_hidden_layers=30,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return {"text_encoder": Mistral3ForConditionalGeneration(config), "tokenizer": tokenizer}


def _named(*pairs: tuple[PreTrainedModel, Any]) -> Parts:
    """Number the second and third encoder as pipelines do."""
    parts: Parts = {}
    for number, (model, tokenizer) in enumerate(pairs):
        end = f"_{number + 1}" if number else ""
        parts[f"text_encoder{end}"], parts[f"tokenizer{end}"] = model, tokenizer
    return parts


def _clip_and_t5() -> Parts:
    return _named(_clip(768), _t5())


def _two_clips() -> Parts:
    return _named(_clip(768), _clip(1280, projected=True))


def _klein() -> Parts:
    return _qwen3(Qwen3ForCausalLM, 27)


_BUILDERS: dict[str, Callable[[], Parts]] = {
    "flux-dev": _clip_and_t5,
    "flux-schnell": _clip_and_t5,
    "sd": lambda: _named(_clip(768)),
    "sdxl": _two_clips,
    "sdxl-turbo": _two_clips,
    "sdxl-lcm": _two_clips,
    "sd3": lambda: _named(_clip(768, projected=True), _clip(1280, projected=True), _t5()),
    "flux2-dev": _mistral,
    "flux2-klein": _klein,
    "flux2-klein-base": _klein,
    "pixart-alpha": lambda: _named(_t5()),
    "pixart-sigma": lambda: _named(_t5()),
    "chroma": lambda: _named(_t5()),
    "sana": _gemma,
    "lumina2": _gemma,
    "qwen-image": _qwen_image,
    "z-image": lambda: _qwen3(Qwen3Model, 2),
}
