"""Fewer ReLUs and fewer layers: sensitivity, budgets, masks, gated branches."""
