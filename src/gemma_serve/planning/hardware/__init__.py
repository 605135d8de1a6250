"""The GPUs, here or by name, and what is wrong with them."""
