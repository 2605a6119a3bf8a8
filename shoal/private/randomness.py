"""One party's half of the correlated randomness of one inference: a seed and the arrays that no seed gives."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import sha256
from math import prod

import numpy as np

from shoal.errors import ShoalError
from shoal.private.plan import Field

SEED_BYTES = 32


def new_seed() -> bytes:
    """32 bytes from the operating system's generator."""
    return secrets.token_bytes(SEED_BYTES)


def expand(seed: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint64 words that only the holder of `seed` can tell from uniform ones: AES-256-CTR under a key for `name`."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    # One key an array and one counter from zero: no two arrays share a block of the stream.
    key = sha256(b"shoal randomness 1\0" + seed + name.encode()).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(8 * prod(shape))), "<u8").reshape(shape)


class Half:
    """Arrays by name; the seeded ones are expanded when first asked for.

    `fields` say what there must be. Raises ShoalError when `stored` does not hold exactly the others.
    """

    def __init__(self, seed: bytes, stored: dict[str, np.ndarray], fields: Iterable[Field]) -> None:
        self.seed, self.stored = seed, stored
        self.fields = {field.name: field for field in fields}
        wanted = {f.name: f.shape for f in self.fields.values() if not f.seeded}
        found = {name: array.shape for name, array in stored.items()}
        if len(seed) != SEED_BYTES or found != wanted or any(a.dtype != np.uint64 for a in stored.values()):
            raise ShoalError("found prepared randomness of another network; need this one's; prepare again")

    def __getitem__(self, name: str) -> np.ndarray:
        field = self.fields[name]
        return expand(self.seed, name, field.shape) if field.seeded else self.stored[name]
