"""Serve Google's Gemma on your own machine with vLLM: one command, shown to work."""

__version__ = "0.1.0"
