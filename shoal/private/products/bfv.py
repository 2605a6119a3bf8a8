"""Microsoft SEAL's BFV scheme for masked products: the client encrypts, the server multiplies, masks and answers.

The plaintext modulus is t = 2^`plain_bits`, and plaintexts are coefficients (no batching). Three things keep an
answer from showing the server's weights, beside the value that the client is to learn:

- each answer gets a fresh encryption of zero under the client's public key, so that its c1 is new and random;
- each answer gets a uniform error of `flood_bits` bits, 40 bits above the worst noise that the products leave, so that
  its noise is within 2^-40 of one that does not depend on the weights;
- a uniform plaintext mask is added to all coefficients, also to those that are not read.

Then the modulus is switched to one prime, which makes the answer smaller.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shoal.errors import ShoalError
from shoal.private.products.parameters import DEGREE, PRIME_BITS, flood_bits

try:
    import seal
except ImportError as _error:
    raise ShoalError(
        f"found no Microsoft SEAL ({_error}); need seal-python of the private extra; do pip install shoal[private]"
    ) from _error

RAW = seal.compr_mode_type.none
_ONE = np.eye(1, DEGREE, dtype=np.int64)[0]


@dataclass(frozen=True)
class Factor:
    """Weights in NTT form. SEAL cannot multiply by zero, so `plain` is 1 where the weights are all `zero`."""

    plain: seal.Plaintext
    zero: bool


class Context:
    """SEAL's context for a plaintext modulus, and the forms in which SEAL stores polynomials."""

    def __init__(self, plain_bits: int) -> None:
        parms = seal.EncryptionParameters(seal.scheme_type.bfv)
        parms.set_poly_modulus_degree(DEGREE)
        parms.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, PRIME_BITS))
        parms.set_plain_modulus(1 << plain_bits)
        self.plain_bits = plain_bits
        self.seal = seal.SEALContext(parms, True, seal.sec_level_type.tc128)
        if not self.seal.parameters_set():
            raise ShoalError(f"found parameters that SEAL refuses ({self.seal.parameter_error_message()})")
        self.primes = tuple(p.value() for p in self.seal.first_context_data().parms().coeff_modulus())
        self.evaluator = seal.Evaluator(self.seal)

    @cached_property
    def _plain_head(self) -> bytes:
        """What SEAL writes before the coefficients of a plaintext."""
        return bytes(seal.Plaintext(DEGREE).to_bytes(RAW))[: -8 * DEGREE]

    @cached_property
    def _heads(self) -> dict[int, bytes]:
        """What SEAL writes before the words of a ciphertext, by its number of primes."""
        keys = seal.KeyGenerator(self.seal)
        made = seal.Encryptor(self.seal, keys.create_public_key()).encrypt_zero()
        small = self.evaluator.mod_switch_to_next(made)
        return {n: bytes(c.to_string(RAW))[: -16 * n * DEGREE] for n, c in ((2, made), (1, small))}

    def plaintext(self, coefficients: np.ndarray) -> seal.Plaintext:
        """The plaintext with these coefficients, uint64 [DEGREE] below t."""
        made = seal.Plaintext()
        made.load_bytes(self.seal, self._plain_head + np.ascontiguousarray(coefficients, "<u8").tobytes())
        return made

    def coefficients(self, plain: seal.Plaintext) -> np.ndarray:
        """uint64 [DEGREE] of a plaintext; SEAL does not write leading zeros."""
        found = np.frombuffer(plain.to_bytes(RAW), "<u8", offset=len(self._plain_head))
        return np.pad(found, (0, DEGREE - len(found)))

    def words(self, cipher: seal.Ciphertext) -> np.ndarray:
        """uint64 [2, primes, DEGREE] of a ciphertext."""
        primes = cipher.coeff_modulus_size()
        raw = cipher.to_string(RAW)
        return np.frombuffer(raw, "<u8", offset=len(self._heads[primes])).reshape(2, primes, DEGREE)

    def ciphertext(self, words: np.ndarray) -> seal.Ciphertext:
        """The ciphertext of these words, uint64 [2, primes, DEGREE]. Raises ShoalError for words above the primes."""
        made = seal.Ciphertext()
        try:
            made.load_bytes(self.seal, self._heads[words.shape[1]] + np.ascontiguousarray(words, "<u8").tobytes())
        except (RuntimeError, ValueError) as error:
            raise ShoalError(f"found a ciphertext that SEAL refuses ({error}); need one of these parameters") from error
        return made


def make_keys(context: Context) -> tuple[bytes, bytes]:
    """A fresh public key and its secret key."""
    generator = seal.KeyGenerator(context.seal)
    return bytes(generator.create_public_key().to_string()), bytes(generator.secret_key().to_string())


class Keys:
    """What the client does with its `secret` key of `make_keys`, which is never stored."""

    def __init__(self, context: Context, secret: bytes) -> None:
        self.context = context
        key = context.seal.from_secret_str(secret)
        self._encryptor, self._decryptor = seal.Encryptor(context.seal, key), seal.Decryptor(context.seal, key)

    def encrypt(self, coefficients: np.ndarray) -> np.ndarray:
        """A fresh ciphertext, uint64 [2, 2, DEGREE], of coefficients uint64 [DEGREE], taken modulo t."""
        below = coefficients & np.uint64((1 << self.context.plain_bits) - 1)
        return self.context.words(self._encryptor.encrypt_symmetric(self.context.plaintext(below)))

    def decrypt(self, words: np.ndarray) -> np.ndarray:
        """The coefficients of an answer, uint64 [2, 1, DEGREE]; a coefficient is right if that of c0 is given."""
        return self.context.coefficients(self._decryptor.decrypt(self.context.ciphertext(words)))


class Evaluator:
    """The server's side of a product: sums of ciphertexts times weights, and answers that hide the weights."""

    def __init__(self, context: Context, public_key: bytes) -> None:
        self.context, self._id = context, context.seal.first_parms_id()
        self.flood_bits = flood_bits(context.plain_bits)
        try:
            self._encryptor = seal.Encryptor(context.seal, context.seal.from_public_str(public_key))
        except (RuntimeError, ValueError) as error:
            raise ShoalError(f"found a public key that SEAL refuses ({error}); need one of these parameters") from error

    def load(self, words: np.ndarray) -> seal.Ciphertext:
        """The client's ciphertext in NTT form."""
        made = self.context.ciphertext(words)
        self.context.evaluator.transform_to_ntt_inplace(made)
        return made

    def weights(self, coefficients: np.ndarray) -> Factor:
        """Signed coefficients int64 [DEGREE] as a factor of products."""
        zero = not coefficients.any()
        used = _ONE if zero else coefficients & ((1 << self.context.plain_bits) - 1)
        made = self.context.plaintext(used.astype(np.uint64))
        self.context.evaluator.transform_to_ntt_inplace(made, self._id)
        return Factor(made, zero)

    def answer(self, pairs: Iterable[tuple[seal.Ciphertext, Factor]], mask: np.ndarray) -> np.ndarray:
        """The sum of all products plus `mask` (uint64 [DEGREE] below t), as a ciphertext uint64 [2, 1, DEGREE].

        Products by zero weights take the same steps as others, but on a sum that is thrown away, so that the time of
        an answer does not show how many of its weights are zero (to one addition, a hundredth of its time).
        """
        evaluator = self.context.evaluator
        sums: dict[bool, seal.Ciphertext] = {}
        for cipher, factor in pairs:
            part = evaluator.multiply_plain(cipher, factor.plain)
            if factor.zero in sums:
                evaluator.add_inplace(sums[factor.zero], part)
            else:
                sums[factor.zero] = part
        answer = self.zero()
        total = sums[False not in sums]
        evaluator.transform_from_ntt_inplace(total)
        evaluator.add_inplace(answer if False in sums else total, total)
        evaluator.add_plain_inplace(answer, self.context.plaintext(mask))
        evaluator.add_inplace(answer, self.context.ciphertext(self.flood()))
        evaluator.mod_switch_to_next_inplace(answer)
        return self.context.words(answer)

    def zero(self) -> seal.Ciphertext:
        """A fresh encryption of zero under the client's public key."""
        return self._encryptor.encrypt_zero()

    def flood(self) -> np.ndarray:
        """Words [2, 2, DEGREE] of a ciphertext (e, 0), with e uniform in [0, 2^flood_bits)."""
        words = np.zeros((2, len(self.context.primes), DEGREE), np.uint64)
        low = random_bits(DEGREE, min(self.flood_bits, 60))
        high = random_bits(DEGREE, self.flood_bits - 60) if self.flood_bits > 60 else np.zeros_like(low)
        for at, prime in enumerate(self.context.primes):
            # 2^60 - prime is below 2^24 and `high` below 2^30, so each sum is below twice the prime.
            found = low + high * np.uint64((1 << 60) - prime)
            words[0, at] = np.where(found < prime, found, found - np.uint64(prime))
        return words


def random_bits(count: int, bits: int) -> np.ndarray:
    """uint64 [count], uniform in [0, 2^bits), from the operating system's generator."""
    size = next(size for size in (1, 2, 4, 8) if bits <= 8 * size)
    words = np.frombuffer(secrets.token_bytes(size * count), f"<u{size}")
    return words.astype(np.uint64) >> np.uint64(8 * size - bits)
