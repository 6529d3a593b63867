"""Low-bit weights of other libraries in safetensors files, as lowbits' own schemes."""
