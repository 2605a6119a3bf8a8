"""What the two parties run: a public `Program` and the server's `Weights`, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shoal.errors import ShoalError
from shoal.private.program.fixed import FIELD_BITS, FixedPoint
from shoal.private.program.steps import TRUNCATING, Shape, Step, check_step
from shoal.storage.arrays import load_arrays
from shoal.storage.files import read_json, replacing, write_text

__all__ = ["Program", "Step", "Weights"]

VERSION = "shoal-program-5"


@dataclass(frozen=True, eq=False)
class Program:
    """A network as public steps on fixed-point words. It holds no weights, and both parties know all of it.

    `keep` maps a relu step to the sorted flat positions, in (C, H, W) order, that have a ReLU; a relu step that is not
    in it has a ReLU everywhere. `ranges` maps the input and each step to the largest magnitude seen in calibration,
    rounded up to a power of two. `input_limit` is the largest magnitude that an image's values may have: a power of
    two, and at most `margin` times the calibrated one. Clients refuse other images. With the default no image but
    zeros is accepted; `compile` always states a limit.
    `error_bound` is empirical, not proved: 4 times the largest difference between the logits of the float network and
    of fixed point with truncation noise, over the calibration images. Programs are equal when their digests are.

    For prepared inference: the input of relu step s is below 2^``sign_bits[s]`` units, `margin` times what calibration
    saw. Steps in `exact` are truncated exactly: their products are computed modulo 2^``exact[s]`` and stay, by the
    same `margin`, below a quarter of that. All other steps are truncated locally; `failure_bound` is an upper bound of
    the probability that any local truncation of one inference fails. `products` holds the parameters of SEAL's products
    and under ``steps`` the steps that it multiplies (`shoal.private.products.parameters`); empty if there is none.
    """

    version: str
    fraction_bits: int
    field_bits: int
    input: str
    input_shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    keep: dict[str, np.ndarray]
    preprocessing: dict[str, Any]
    error_bound: float
    ranges: dict[str, float] = field(default_factory=dict)
    sign_bits: dict[str, int] = field(default_factory=dict)
    exact: dict[str, int] = field(default_factory=dict)
    failure_bound: float = 0.0
    input_limit: float = 0.0
    products: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of all fields in hex, which the parties compare before they start."""
        hasher = hashlib.sha256(json.dumps(self._body(), sort_keys=True, separators=(",", ":")).encode())
        _absorb(hasher, self.keep, "<i4")
        return hasher.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def _body(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("keep", "steps")}
        return plain | {"steps": [asdict(step) for step in self.steps]}

    def save(self, folder: Path | str) -> None:
        """Write `program.json` and `keep.safetensors` into `folder`."""
        folder = Path(folder)
        write_text(folder / "program.json", json.dumps({"digest": self.digest(), **self._body()}, indent=1))
        with replacing(folder / "keep.safetensors") as scratch:
            save_file({k: np.ascontiguousarray(v) for k, v in self.keep.items()}, scratch)

    @classmethod
    def load(cls, folder: Path | str) -> Program:
        """Read what `save` wrote. Raises ShoalError for another version and for a truncated or altered file."""
        path = Path(folder) / "program.json"
        body, tensors = read_json(path), load_arrays(Path(folder) / "keep.safetensors")
        version = body.get("version") if isinstance(body, dict) else None
        if version != VERSION:
            raise ShoalError(f"found program version {version!r} at {path}; need {VERSION!r}; compile again")
        try:
            program = cls._parse(body, tensors)
            if program.digest() != body["digest"]:
                raise ShoalError(f"found a program unlike what was saved at {path}; need it unaltered; compile again")
            program.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShoalError(f"found a malformed program ({error!r}) at {path}; need an intact file") from error
        return program

    @classmethod
    def _parse(cls, body: dict[str, Any], keep: dict[str, np.ndarray]) -> Program:
        steps = tuple(
            Step(s["name"], s["op"], tuple(s["inputs"]), tuple(s["shape"]), dict(s["attrs"])) for s in body["steps"]
        )
        lists: dict[str, Any] = {k: tuple(body[k]) for k in ("input_shape", "outputs")}
        plain = {k: v for k, v in body.items() if k not in ("digest", "steps", *lists)}
        return cls(**plain, **lists, steps=steps, keep=keep)

    def check(self) -> None:
        """Raise ShoalError unless all steps are known, in order and of fitting shapes, and `keep` lies within them."""
        FixedPoint(self.fraction_bits, self.field_bits)
        shapes: dict[str, Shape] = {self.input: self.input_shape}
        for step in self.steps:
            absent = [name for name in step.inputs if name not in shapes]
            if absent or step.name in shapes:
                raise ShoalError(f"found step {step.name!r} out of order; need inputs first, each name once")
            check_step(step, [shapes[name] for name in step.inputs])
            shapes[step.name] = step.shape
        if not self.outputs or not set(self.outputs) <= set(shapes) - {self.input}:
            raise ShoalError(f"found outputs {self.outputs}; need names of steps; compile again")
        relus = {step.name: step for step in self.steps if step.op == "relu"}
        for name, positions in self.keep.items():
            _check_keep(name, positions, relus)
        _check_phases(self)
        _check_figures({"error_bound": self.error_bound, "failure_bound": self.failure_bound, **self.ranges})
        _check_limit(self.input_limit, self.fraction_bits)


def _absorb(hasher: Any, arrays: dict[str, np.ndarray], dtype: str) -> None:
    for name in sorted(arrays):
        hasher.update(f"{name}:{arrays[name].shape};".encode())
        hasher.update(np.ascontiguousarray(arrays[name], dtype=dtype).tobytes())


def _check_keep(name: str, positions: np.ndarray, relus: dict[str, Step]) -> None:
    if name not in relus:
        raise ShoalError(f"found kept positions of {name!r}; need the name of a relu step; compile again")
    size = math.prod(relus[name].shape)
    sound = positions.dtype == np.int32 and positions.ndim == 1 and positions.size > 0
    if not sound or positions[0] < 0 or positions[-1] >= size or (np.diff(positions) < 1).any():
        raise ShoalError(f"found wrong kept positions at {name}; need sorted int32 below {size}; compile again")


def _check_phases(program: Program) -> None:
    relus = {step.name for step in program.steps if step.op == "relu"}
    truncating = {step.name for step in program.steps if step.op in TRUNCATING}
    bits = program.sign_bits
    sound = all(isinstance(b, int) and 1 <= b <= FIELD_BITS - 2 for b in bits.values())
    least = program.fraction_bits + 2
    sound = sound and all(isinstance(b, int) and least <= b <= FIELD_BITS for b in program.exact.values())
    sound = sound and set(program.products.get("steps", ())) <= set(program.exact)
    if set(bits) - relus or not sound or not set(program.exact) <= truncating:
        raise ShoalError("found sign bits or exact truncations of other steps; need this program's; compile again")


def _check_figures(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ShoalError(f"found {value!r} as the error bound or range of {name}; need a finite number >= 0")


def _check_limit(limit: Any, fraction_bits: int) -> None:
    # SPU takes images as float32, which holds every word up to 2^24.
    most = 2.0 ** (24 - fraction_bits)
    if not isinstance(limit, (int, float)) or not 0 <= limit <= most:
        raise ShoalError(f"found input limit {limit!r}; need a number from 0 to {most:g}; compile again")


@dataclass(frozen=True, eq=False)
class Weights:
    """The server's secret: int64 words ``"<step>.weight"`` and ``"<step>.bias"`` at scale 2^fraction_bits.

    Every conv2d and linear step has both. Weights are [O, C/groups, kh, kw] or [O, F], biases [O].
    """

    arrays: dict[str, np.ndarray]

    def save(self, folder: Path | str) -> None:
        """Write `weights.safetensors` into `folder`."""
        arrays = {k: np.ascontiguousarray(v) for k, v in self.arrays.items()}
        with replacing(Path(folder) / "weights.safetensors") as scratch:
            save_file(arrays, scratch, metadata={"sha256": self.digest()})

    @classmethod
    def load(cls, folder: Path | str) -> Weights:
        """Read what `save` wrote. Raises ShoalError for a file that is missing, truncated or altered."""
        path = Path(folder) / "weights.safetensors"
        weights = cls(load_arrays(path))
        try:
            with safe_open(path, framework="np") as file:
                stated = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError) as error:
            raise ShoalError(f"found an unreadable weight file at {path} ({error}); need an intact one") from error
        if stated != weights.digest() or any(a.dtype != np.int64 for a in weights.arrays.values()):
            raise ShoalError(f"found weights unlike what was saved at {path}; need them unaltered; compile again")
        return weights

    def digest(self) -> str:
        """SHA-256 of all words in hex; the server's prepared items have it, because they serve these weights only."""
        hasher = hashlib.sha256()
        _absorb(hasher, self.arrays, "<i8")
        return hasher.hexdigest()

    def check(self, program: Program) -> None:
        """Raise ShoalError unless these are the weights of `program`: the same names and fitting shapes."""
        shapes = {step.name: step.shape for step in program.steps} | {program.input: program.input_shape}
        wanted: dict[str, Shape] = {}
        for step in program.steps:
            if step.op in ("conv2d", "linear"):
                out, channels = step.shape[0], shapes[step.inputs[0]][0] // step.attrs.get("groups", 1)
                kernel = self.arrays.get(f"{step.name}.weight", np.empty(0)).shape[2:]
                kernel = kernel if step.op == "conv2d" and len(kernel) == 2 else ()
                wanted[f"{step.name}.weight"] = (out, channels, *step.attrs.get("kernel", kernel))
                wanted[f"{step.name}.bias"] = (out,)
        found = {name: array.shape for name, array in self.arrays.items()}
        if found != wanted:
            name = min(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            raise ShoalError(
                f"found shape {found.get(name)} at {name}; need {wanted.get(name)}; use weights and program "
                "of one compilation"
            )
