"""The two parties' shares of the input image: the client's is x - p, the server's is p, for a pad p that both derive.

**Why the image is padded.** Local truncation is right only for shares that are uniform: a value y then fails with
probability at most abs(y) / 2^64. With the shares (x, 0) it fails for every y < 0, because the client alone truncates
the unsigned word 2^64 - abs(y). Averages, sums and concatenations of the image itself are truncated like that.

**The pad.** p is one AES-256-CTR stream whose key is the SHA-256 of the item's name. The name has 128 random bits, is
used once, and both parties know it before the inference. So the pad costs no bytes, neither on the wire nor on disk.

**What each party sees.** The pad is no secret between the parties, and protects nothing. The server's share of the
image is p, which does not depend on x. What the server receives about x is still x - p - r, where r is the mask that
only the client knows, and the masked bits and words of ReLUs, as before. The client knows p, and so the server's share
of every value before the first linear layer: those are public functions of p, without any weight.

**Failure bound.** Before the first truncation a value is y = L x, where L has integer coefficients. Let 2^k be the
largest power of two that divides all of them. The client's share is L (x - p). As p is uniform (to anybody who
cannot tell the stream from random words) and chosen independently of x, this share is uniform over the multiples of
2^k modulo 2^64. y is a multiple of 2^k, too. Local truncation fails exactly when the integers that stand for both
shares add up to y plus or minus 2^64, which at most abs(y) / 2^k of these 2^(64 - k) shares do. So the probability
is at most abs(y) / 2^64, as for features, and `failure_bound` of the program, which counts every truncating step, holds
for those that read the image as well. Exact truncations and signs are right for any shares.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from shoal.private.program.steps import Shape
from shoal.private.protocol.randomness import expand


def image_share(item: str, shape: Shape, image: Tensor | None) -> Tensor:
    """One party's share of the image, int64 [1, *shape]; `image` (int64, the same shape) is None at the server.

    `item` is the name of the item that the inference spends. It must be the same at both parties.
    """
    seed = sha256(b"shoal image pad 1" + item.encode()).digest()
    # A copy: the expanded words are read-only, and torch accepts only arrays that it may write to.
    pad = torch.from_numpy(expand(seed, {"pad": (1, *shape)})["pad"].view(np.int64).copy())
    return pad if image is None else image - pad
