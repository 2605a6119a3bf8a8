"""The training loop and what it is made of. It knows no method."""
