"""``lowbits`` and ``python -m lowbits``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from lowbits.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.stderr.write(f"error: the command line needs {package}: pip install 'lowbits[cli]'\n")
        sys.exit(1)
    app()


if __name__ == "__main__":
    main()
