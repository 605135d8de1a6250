"""The command line: options in, one use case called, its result handed to `view`."""

from gemma_serve.cli.app import main

__all__ = ["main"]
