"""The smoke test as values: its promises, what it asks, and what makes an answer right."""
