"""Lets `python -m gemma_serve` stand for the `gemma-serve` command."""

from gemma_serve.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
