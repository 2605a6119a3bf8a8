"""Distillation: loss terms, teaching paths, feature losses, peer networks, and k-NN soft labels."""
