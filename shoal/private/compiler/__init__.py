"""From a folded graph to a program: lowering, fixed point, truncation, deployment."""
