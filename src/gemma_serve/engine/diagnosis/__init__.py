"""What a log says went wrong: the one root cause, of those that are known."""
