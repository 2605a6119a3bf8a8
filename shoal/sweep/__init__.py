"""Sweeps: grids and seeds of shoal's commands, in local processes or on a Ray cluster."""
