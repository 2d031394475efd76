"""Prompts to embeddings: encoders, and references and negatives that a store keeps.

``prompts`` decides what is to encode, ``encode`` does it with ``encoders``; ``negative`` finds
what classifier-free guidance leads away from.
"""

from fedgfe_store.text.encode import EncodingReport, encode_references
from fedgfe_store.text.prompts import EncodingPlan, Reference, plan_references

__all__ = [
    "EncodingPlan",
    "EncodingReport",
    "Reference",
    "encode_references",
    "plan_references",
]
