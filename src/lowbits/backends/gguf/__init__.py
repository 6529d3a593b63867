"""GGUF block formats, in torch; the ``gguf`` package is not needed to read or make them."""
