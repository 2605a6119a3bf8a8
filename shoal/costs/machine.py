"""Constants of a machine: the seconds that each operation of private inference takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from shoal.errors import ShoalError
from shoal.storage.files import read_json, write_text


@dataclass(frozen=True)
class Machine:
    """Seconds per operation between two parties; `shoal calibrate` measures them.

    Products of SEAL: `seal_transform_s` per polynomial of weights, `seal_product_s` per product of a ciphertext and
    weights, `seal_input_s` per ciphertext of the client, `seal_answer_s` per answer, and `seal_start_s` for the keys of
    a batch. Products of SPU: `product_s` per ciphertext product, `automorphism_s` per automorphism. The rest of the
    offline phase: `and_s` per AND of two 64-bit words, `chosen_s` per product of a bit and a word, `run_s` per call of
    SPU. Online phase: `exchange_s` per exchange without network time, `mac_s` per float64 multiply-add, `weight_s` per
    weight that is read, `relu_s` per kept ReLU, `value_s` per value that enters or leaves a linear layer, `query_s` per
    inference. The defaults were measured on two cores shared by both parties, over TLS on loopback.
    """

    seal_transform_s: float = 0.37e-3
    seal_product_s: float = 0.23e-3
    seal_input_s: float = 1.0e-3
    seal_answer_s: float = 4.2e-3
    seal_start_s: float = 0.03

    product_s: float = 0.33e-3
    automorphism_s: float = 1.4e-3
    and_s: float = 15e-6
    chosen_s: float = 1.6e-6
    run_s: float = 0.07
    exchange_s: float = 0.36e-3
    mac_s: float = 0.5e-10
    weight_s: float = 3e-9
    relu_s: float = 0.13e-6
    value_s: float = 0.01e-6
    query_s: float = 4.5e-3

    def save(self, path: Path) -> None:
        """Write the constants as JSON."""
        write_text(path, json.dumps({"shoal_machine": 1} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read what `save` wrote.

        Raises ShoalError when the file is missing, damaged, of another kind, or of an earlier version that measured
        other constants.
        """
        body = read_json(path)
        names = [f.name for f in fields(cls)]
        if not isinstance(body, dict) or "shoal_machine" not in body:
            raise _unfit("no constants of a machine", path)
        if missing := [name for name in names if name not in body]:
            raise _unfit(f"a machine without {', '.join(missing)}", path)
        values = {name: body[name] for name in names}
        if not all(isinstance(v, (int, float)) and v >= 0 for v in values.values()):
            raise _unfit("a constant that is no number of seconds", path)
        return cls(**values)


def _unfit(what: str, path: Path) -> ShoalError:
    return ShoalError(f"found {what} at {path}; need what shoal calibrate wrote in this version; calibrate again")
