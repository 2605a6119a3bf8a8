"""What shoal raises for its users, and what it warns of."""

from __future__ import annotations


class ShoalError(Exception):
    """Something that the user can mend: *found X at NAME; need Y; do Z*."""


class ShoalWarning(UserWarning):
    """Something that was asked for and is not to be had here, and what is done instead."""
