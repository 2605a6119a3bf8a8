"""Errors and warnings for shoal's users."""

from __future__ import annotations

from typing import ClassVar

TRY_AGAIN = 75
"""Exit status of a command that stopped at a checkpoint, which is not a failure: EX_TEMPFAIL of sysexits.h."""


class ShoalError(Exception):
    """An error that the user can correct: *found X at NAME; need Y; do Z*."""

    status: ClassVar[int] = 1
    """Exit status of the command line."""


class StoppedError(ShoalError):
    """Time ran out, and the command stopped at a checkpoint; resuming continues from there."""

    status = TRY_AGAIN


class ShoalWarning(UserWarning):
    """Something that was asked for is not available here; the message says what is done instead."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the lines after it are internal details."""
    return (str(error).splitlines() or [""])[0]
