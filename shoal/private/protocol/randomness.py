"""One party's half of an item of correlated randomness: a seed, and the arrays that cannot come from a seed."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from math import prod

import numpy as np

from shoal.errors import ShoalError
from shoal.private.protocol.layout import Field

SEED_BYTES = 32


def new_seed() -> bytes:
    """32 bytes from the operating system's generator."""
    return secrets.token_bytes(SEED_BYTES)


def expand(seed: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays of pseudorandom uint64 words from one AES-256-CTR stream.

    Without `seed` nobody can tell them from uniform words. The arrays are taken from the stream in the order of
    `shapes`, so use a seed with one list of shapes only.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    sizes = [prod(shape) for shape in shapes.values()]
    if not sizes:
        return {}  # as at the server of a network without a ReLU
    key = sha256(b"shoal randomness 1" + seed).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(8 * sum(sizes))), "<u8")
    parts = np.split(words, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def seeded(fields: Iterable[Field]) -> dict[str, tuple[int, ...]]:
    """Shapes of the seeded fields, in their order."""
    return {f.name: f.shape for f in fields if f.seeded}


class Half(Mapping[str, np.ndarray]):
    """One party's arrays by name, including those expanded from the seed.

    `fields` lists all arrays. Raises ShoalError unless `stored` holds exactly those that are not seeded.
    """

    def __init__(self, seed: bytes, stored: dict[str, np.ndarray], fields: Iterable[Field]) -> None:
        fields = list(fields)
        wanted = {f.name: f.shape for f in fields if not f.seeded}
        found = {name: array.shape for name, array in stored.items()}
        if len(seed) != SEED_BYTES or found != wanted or any(a.dtype != np.uint64 for a in stored.values()):
            raise ShoalError("found prepared randomness of another network; need this one's; prepare again")
        self.seed, self.stored = seed, stored
        self._arrays = stored | expand(seed, seeded(fields))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
