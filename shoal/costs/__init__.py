"""Estimates of the cost of private inference before compilation: protocols, machines, links, targets and plans."""
