"""Low-bit checkpoints: read, written, converted."""
