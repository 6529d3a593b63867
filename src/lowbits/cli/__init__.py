"""The command line: needs the ``cli`` extra."""
