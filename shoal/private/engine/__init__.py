"""Everything that runs inside SPU, in worker processes."""
