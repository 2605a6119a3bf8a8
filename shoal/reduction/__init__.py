"""Removing ReLUs and layers: sensitivities, budgets, masks, learners of masks, gated branches, dropped layers."""
