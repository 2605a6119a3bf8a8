"""The certificates that may connect: a text file of fingerprints, which an operator edits while the server runs."""

from __future__ import annotations

import re
from pathlib import Path

from shoal.errors import ShoalError

FINGERPRINT = re.compile("[0-9a-f]{64}")


def read_fingerprints(path: Path) -> set[str]:
    """The SHA-256 fingerprints in a file, as 64 lower-case hex digits.

    Each line has one, with or without colons; what follows a ``#`` is a comment. Raises ShoalError for a file that
    cannot be read and for any other line, so a mistake never lets anybody in.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ShoalError(
            f"found no readable list of certificates at {path} ({error}); need one; mend --allow"
        ) from error
    found = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip().replace(":", "").lower()
        if text and not FINGERPRINT.fullmatch(text):
            raise ShoalError(
                f"found {text[:80]!r} at line {number} of {path}; need the SHA-256 fingerprint of a certificate, 64 "
                "hex digits; copy it from shoal certs or openssl x509 -fingerprint -sha256"
            )
        found |= {text} - {""}
    return found
