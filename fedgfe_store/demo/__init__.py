"""The demo: ten drawn classes, embeddings for them, and a tiny FLUX that draws them."""
