"""The training loop and its parts. It is independent of any method of reduction."""
