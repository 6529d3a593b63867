"""The arithmetic of LoRA on packed weights."""
