"""``lowbits`` and ``python -m lowbits``."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    # Read when torch is imported. Threads that spin while they wait save 10 % on idle cores, and
    # make drawing up to eight times slower where another program uses the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A pipe of Windows may not take the letters of a file's name, when all is done.
            stream.reconfigure(errors="backslashreplace")
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
