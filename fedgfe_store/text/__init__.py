"""Prompts to embeddings: encoders, and references and negatives as records of a store."""
