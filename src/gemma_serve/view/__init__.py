"""Results as text for people and as JSON for programs. The only home of rich."""
