"""The demo's federation as a Flower app."""
