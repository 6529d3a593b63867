"""Low-bit checkpoints: read, written, converted."""

from lowbits.files import gguf as gguf
