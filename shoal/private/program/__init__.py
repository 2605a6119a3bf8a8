"""What the parties run: a public program, the server's weights, and their meaning in the clear."""
