"""The command line, a file per command."""

from jaxattn.cli.main import run

__all__ = ["run"]
