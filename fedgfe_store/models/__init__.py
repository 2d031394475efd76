"""Which image model, does it fit, where its weights lie; the calls of diffusers."""
