"""What the parties run: a public `Program`, the server's `Weights`; and `compile`, which makes both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from shoal.checkpoint import replacing, write_text
from shoal.errors import ShoalError
from shoal.graph import Graph, Node, load_weights, read_json
from shoal.private.clear import OPS, TRUNCATING, Shape, Step, check_step, run_clear
from shoal.private.fixed import FIELD_BITS, Demand, FixedPoint, choose_fraction_bits
from shoal.private.truncation import MAX_FAILURE, exact_steps, failure_chances, sign_bits

__all__ = ["Program", "Step", "Weights", "compile"]

VERSION = "shoal-program-2"
CHUNK = 32


@dataclass(frozen=True, eq=False)
class Program:
    """A network as public steps on fixed-point words; it holds no weight, and both parties know all of it.

    `keep` maps a relu step to the sorted flat positions, (C, H, W) order, that have a ReLU; a relu step that is
    absent has one everywhere. `ranges` maps the input and each step to the largest magnitude seen in calibration.
    `error_bound` is empirical, not proved: 4 times the largest difference of logits, float network against
    fixed point with truncation noise, over the calibration images. Programs are equal when their digests are.

    For inference in two phases: the input of relu step s is below 2^``sign_bits[s]`` units (`margin` times what
    calibration saw), results of `exact` steps are truncated exactly, all others locally, and `failure_bound` bounds
    the probability that any local truncation of one inference fails.
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
    exact: tuple[str, ...] = ()
    failure_bound: float = 0.0

    def digest(self) -> str:
        """SHA-256 in hex over every field: what the parties compare before they start."""
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
        """Read what `save` wrote. Raises ShoalError on another version and on a truncated or altered file."""
        path = Path(folder) / "program.json"
        body, tensors = read_json(path), load_weights(Path(folder) / "keep.safetensors")
        version = body.get("version") if isinstance(body, dict) else None
        if version != VERSION:
            raise ShoalError(f"found program version {version!r} at {path}; need {VERSION!r}; compile again")
        try:
            program = cls._parse(body, {k: v.numpy() for k, v in tensors.items()})
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
        lists: dict[str, Any] = {k: tuple(body[k]) for k in ("input_shape", "outputs", "exact")}
        plain = {k: v for k, v in body.items() if k not in ("digest", "steps", *lists)}
        return cls(**plain, **lists, steps=steps, keep=keep)

    def check(self) -> None:
        """Raise ShoalError unless steps are known, in order, of fitting shapes, and `keep` lies inside them."""
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
    if set(bits) - relus or not sound or not set(program.exact) <= truncating:
        raise ShoalError("found sign bits or exact truncations of other steps; need this program's; compile again")


def _check_figures(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ShoalError(f"found {value!r} as the error bound or range of {name}; need a finite number >= 0")


@dataclass(frozen=True, eq=False)
class Weights:
    """The server's secret: int64 words ``"<step>.weight"`` and ``"<step>.bias"`` at scale 2^fraction_bits.

    Shapes are [O, C/groups, kh, kw] or [O, F], and [O]. Every conv2d and linear step has both.
    """

    arrays: dict[str, np.ndarray]

    def save(self, folder: Path | str) -> None:
        """Write `weights.safetensors` into `folder`."""
        arrays = {k: np.ascontiguousarray(v) for k, v in self.arrays.items()}
        with replacing(Path(folder) / "weights.safetensors") as scratch:
            save_file(arrays, scratch, metadata={"sha256": self._checksum()})

    @classmethod
    def load(cls, folder: Path | str) -> Weights:
        """Read what `save` wrote. Raises ShoalError on a file that is missing, truncated or altered."""
        path = Path(folder) / "weights.safetensors"
        weights = cls({k: v.numpy() for k, v in load_weights(path).items()})
        try:
            with safe_open(path, framework="np") as file:
                stated = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError) as error:
            raise ShoalError(f"found an unreadable weight file at {path} ({error}); need an intact one") from error
        if stated != weights._checksum() or any(a.dtype != np.int64 for a in weights.arrays.values()):
            raise ShoalError(f"found weights unlike what was saved at {path}; need them unaltered; compile again")
        return weights

    def _checksum(self) -> str:
        hasher = hashlib.sha256()
        _absorb(hasher, self.arrays, "<i8")
        return hasher.hexdigest()

    def check(self, program: Program) -> None:
        """Raise ShoalError unless these are weights of `program`: the same names, fitting shapes."""
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


def compile(
    graph: Graph,
    calibration: Tensor,
    *,
    fraction_bits: int | None = None,
    margin: float = 4.0,
    max_failure: float = MAX_FAILURE,
    preprocessing: dict[str, Any] | None = None,
) -> tuple[Program, Weights]:
    """The public Program and the server's Weights of a folded `graph`.

    `calibration` [N, *input shape] holds images as the network sees them (preprocessed); magnitudes up to
    `margin` times theirs must fit. `fraction_bits` None takes the most that fit, at most 18. As few steps as keep the
    probability of a failed local truncation in one inference under `max_failure` are truncated exactly. `preprocessing`
    holds lists ``mean`` and ``std``, one number a channel, and ``class_names`` (list or None); it defaults to no
    change. Raises ShoalError, naming the node, on operations without a private form, on NaN and infinity, and
    when a magnitude does not fit.
    """
    graph = replace(graph, weights={k: w.detach().cpu() for k, w in graph.weights.items()})
    steps, keep, outputs = _lower(graph)
    parameters = _parameters(graph, steps)
    ranges, masses = _ranges(graph, [step.name for step in steps], calibration.detach().cpu(), margin)
    fixed = FixedPoint(
        choose_fraction_bits(_demands(graph.input.name, steps, parameters, ranges, margin), fraction_bits)
    )
    name, shape = graph.input.name, tuple(graph.input.shape)
    asked = _preprocessing(preprocessing, shape[0])
    program = Program(VERSION, fixed.fraction_bits, FIELD_BITS, name, shape, steps, outputs, keep, asked, 0.0, ranges)
    chances = failure_chances(steps, parameters, masses, fixed.fraction_bits, margin)
    exact, bound = exact_steps(chances, max_failure)
    bits = {s.name: sign_bits(ranges[s.inputs[0]] * margin, fixed) for s in steps if s.op == "relu"}
    program = replace(program, sign_bits=bits, exact=exact, failure_bound=bound)
    weights = Weights({name: fixed.encode(value, name) for name, value in parameters.items()})
    program.check()
    return replace(program, error_bound=_error_bound(graph, program, weights, calibration.detach().cpu())), weights


def _lower(graph: Graph) -> tuple[tuple[Step, ...], dict[str, np.ndarray], tuple[str, ...]]:
    """Steps of the nodes that the outputs need. A ReLU whose mask is empty is the identity and vanishes."""
    alias, live = {graph.input.name: graph.input.name}, _live(graph)
    steps: list[Step] = []
    keep: dict[str, np.ndarray] = {}
    for node in (n for n in graph.nodes[1:] if n.name in live):
        _refuse(node)
        inputs = tuple(alias[name] for name in node.inputs)
        mask = graph.parameters(node).get("mask")
        positions = None if mask is None else _positions(node, mask)
        alias[node.name] = node.name if positions is None or len(positions) else inputs[0]
        if alias[node.name] == node.name:
            steps.append(Step(node.name, node.op, inputs, tuple(node.shape), _attrs(graph, node)))
            if positions is not None and len(positions) < math.prod(node.shape):
                keep[node.name] = positions
    return tuple(steps), keep, tuple(alias[name] for name in graph.outputs)


def _live(graph: Graph) -> set[str]:
    live = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in live:
            live |= set(node.inputs)
    return live


INSTEAD = {
    "batch_norm": "a graph without batch normalisation; fold it into the convolutions first (shoal.fold)",
    "max_pool2d": "average pooling, which compares nothing; exchange the layer for nn.AvgPool2d and finetune",
}


def _refuse(node: Node) -> None:
    if node.op not in OPS:
        instead = INSTEAD.get(node.op, f"one of {', '.join(OPS)}; rewrite that part of the model with them")
        raise ShoalError(f"found {node.attrs.get('target', node.op)} at {node.name}; need {instead}")


def _positions(node: Node, mask: Tensor) -> np.ndarray:
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(node.shape):
        raise ShoalError(
            f"found a {mask.dtype} mask of shape {tuple(mask.shape)} at {node.name}; need bool "
            f"{tuple(node.shape)}; freeze the masks for this input size"
        )
    return np.flatnonzero(mask.numpy()).astype(np.int32)


def _attrs(graph: Graph, node: Node) -> dict[str, Any]:
    """The node's attributes in JSON's own types, so that a saved program is equal to the one in memory."""
    attrs = {name: node.attrs[name] for name in OPS[node.op].attrs if name in node.attrs}
    if node.op == "conv2d":
        # The client must know the kernel's size, and the result's shape does not tell it when strided.
        attrs["kernel"] = list(graph.weights[f"{node.name}.weight"].shape[2:])
    return json.loads(json.dumps(attrs))


def _parameters(graph: Graph, steps: Iterable[Step]) -> dict[str, np.ndarray]:
    """float64 weight and bias (zeros where there is none) of each linear step; ShoalError on NaN, infinity."""
    table: dict[str, np.ndarray] = {}
    for step in steps:
        if step.op in ("conv2d", "linear"):
            own = graph.parameters(step.name)
            bias = own.get("bias", torch.zeros(len(own["weight"])))
            table |= {
                f"{step.name}.weight": own["weight"].double().numpy(),
                f"{step.name}.bias": bias.double().numpy(),
            }
    for name, values in table.items():
        if not np.isfinite(values).all():
            raise ShoalError(f"found NaN or infinity in {name}; need finite weights; look for diverged training")
    return table


def _ranges(graph: Graph, names: list[str], images: Tensor, margin: float) -> tuple[dict[str, float], dict[str, float]]:
    """Largest magnitude of the input and of each named node over the images, and the largest sum of one image's."""
    if not len(images) or not images.is_floating_point() or not (math.isfinite(margin) and margin >= 1):
        raise ShoalError(
            f"found {len(images)} {images.dtype} calibration images and margin {margin}; need at least one "
            "preprocessed float image and a margin of 1 or more; pass a few hundred training images"
        )
    ranges = dict.fromkeys([graph.input.name, *names], 0.0)
    masses = dict.fromkeys(ranges, 0.0)
    with torch.no_grad():
        for chunk in images.split(CHUNK):
            values = graph.values(chunk, keep=True)
            for name in ranges:
                # Tensor.max keeps NaN, Python's would lose it.
                sizes = values[name].abs().flatten(1)
                ranges[name] = float(np.maximum(ranges[name], float(sizes.max())))
                masses[name] = max(masses[name], float(sizes.sum(1).max()))
    for name, value in ranges.items():
        if not math.isfinite(value):
            raise ShoalError(f"found value {value} at {name} in calibration; need finite numbers; check the images")
    return ranges, masses


def _preprocessing(given: dict[str, Any] | None, channels: int) -> dict[str, Any]:
    asked = {"mean": [0.0] * channels, "std": [1.0] * channels, "class_names": None} | (given or {})
    mean, std, names = (
        [float(m) for m in asked["mean"]],
        [float(s) for s in asked["std"]],
        asked["class_names"],
    )
    if len(asked) > 3 or len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise ShoalError(
            f"found preprocessing {given} for {channels} channels; need lists mean and std (above zero) of "
            "that length, and class_names; pass those that the network was trained with"
        )
    return {"mean": mean, "std": std, "class_names": None if names is None else [str(n) for n in names]}


def _demands(
    image: str,
    steps: Iterable[Step],
    parameters: dict[str, np.ndarray],
    ranges: dict[str, float],
    margin: float,
) -> list[Demand]:
    # SPU takes inputs, weights and biases as float32, exact below 2^24; its truncation wants products below
    # 2^62; the prepared ReLU reads the low 32 bits alone, so activations stay below 2^31.
    what = f"magnitude ({margin:g} times the calibrated one)"
    found = [Demand(k, "magnitude", float(np.abs(v).max(initial=0.0)), 1, 24) for k, v in parameters.items()]
    found.append(Demand(image, what, ranges[image] * margin, 1, 24))
    for step in steps:
        value = ranges[step.name] * margin
        found += [Demand(step.name, what, value, 1, 31), Demand(step.name, what, value, 1, 24, hard=False)]
        if step.op in TRUNCATING:
            bias = parameters.get(f"{step.name}.bias", np.zeros(1))
            product = (ranges[step.name] + float(np.abs(bias).max(initial=0.0))) * margin
            found.append(Demand(step.name, f"product of {what}", product, 2, 62))
    return found


def _error_bound(graph: Graph, program: Program, weights: Weights, images: Tensor) -> float:
    """4 times the largest difference seen; at least one unit for each truncation and one for the input."""
    private = run_clear(program, weights, images, noise=np.random.default_rng(0), batch=CHUNK)
    with torch.no_grad():
        parts = [graph(chunk) for chunk in images.split(CHUNK)]
    worst = max(
        float(np.abs(torch.cat(column).double().numpy() - logits).max())
        for column, logits in zip(zip(*parts, strict=True), private, strict=True)
    )
    truncations = sum(step.op in TRUNCATING for step in program.steps)
    return max(4 * worst, (1 + truncations) / 2**program.fraction_bits)
