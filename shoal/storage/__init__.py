"""Files: atomic writes, tensors with checksums, checkpoints, run folders."""
