"""Who teaches a network, and how: losses, paths, hints, peers, neighbours in the batch."""
