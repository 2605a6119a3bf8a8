"""Recipes: for each paper, a file or package that runs its whole method on a network."""
