"""The built-in backends; each one is found through the entry points in pyproject.toml."""
