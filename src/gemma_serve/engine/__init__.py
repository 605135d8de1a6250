"""One vLLM process and what it says."""
