"""How vLLM divides memory, and what to run so that it fits."""
