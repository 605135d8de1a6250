"""The Hugging Face Hub: what it knows of a model, who may read it, and its files."""
