"""The one error type that shoal raises for its users."""

from __future__ import annotations


class ShoalError(Exception):
    """Something that the user can mend: *found X at NAME; need Y; do Z*."""
