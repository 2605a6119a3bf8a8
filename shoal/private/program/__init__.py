"""What the two parties run: a public program, the server's weights, and the same computation in the clear."""
