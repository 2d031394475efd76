"""Images from stored embeddings: plan first, then denoise, decode and write."""
