"""Compiles a folded graph into a program: lowering, fixed point, truncation, deployment."""
