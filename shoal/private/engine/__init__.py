"""What runs inside SPU, in worker processes."""
