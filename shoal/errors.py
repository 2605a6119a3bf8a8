"""What shoal raises for its users, and what it warns of."""

from __future__ import annotations

from typing import ClassVar

TRY_AGAIN = 75
"""The exit status of a command that stopped at a checkpoint: EX_TEMPFAIL of sysexits.h, for what is no failure."""


class ShoalError(Exception):
    """Something that the user can mend: *found X at NAME; need Y; do Z*."""

    status: ClassVar[int] = 1
    """What the command line exits with."""


class StoppedError(ShoalError):
    """Time ran out at a checkpoint; resume goes on from it."""

    status = TRY_AGAIN


class ShoalWarning(UserWarning):
    """Something that was asked for and is not to be had here, and what is done instead."""


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that tell of its inside."""
    return (str(error).splitlines() or [""])[0]
