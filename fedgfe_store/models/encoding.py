"""How a family's pipeline turns prompts into the columns that it is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Encoding:
    """How a pipeline's ``encode_prompt`` is called, and what it returns.

    Parameters
    ----------
    returns : tuple of str
        Which argument of the pipeline each returned value is, in their order; empty for a value
        that is none. Arguments ``negative_...`` are what it makes of a negative prompt; where
        there are none, a negative prompt is encoded as any other.
    arguments : mapping
        What it is called with. What is not said here is as the pipeline's own call has it.
    length : str
        Argument that takes the tokens of a sequence; empty where the tokenizer has the last word.
    besides : int
        Tokens of a sequence that `length` does not count.
    """

    returns: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    length: str = ""
    besides: int = 0
