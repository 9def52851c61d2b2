"""The command `aigc`: data to stdout, talk to stderr, exit codes as in docs/cli.md."""

from api.cli.main import main

__all__ = ["main"]
