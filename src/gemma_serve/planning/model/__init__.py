"""What a Gemma is: its shape, its weights, what is known of it before it is loaded."""
