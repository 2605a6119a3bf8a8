"""`Run`: one folder a run, with everything that made a result and everything needed to use it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.checkpoint import Checkpoint, write_tensors, write_text
from shoal.errors import ShoalError
from shoal.graph import read_json
from shoal.spec import Spec, load_model


def environment() -> dict[str, Any]:
    """Versions and machine that a figure was made with."""
    names = ("shoal", "torch", "numpy", "spu", "jax", "scikit-learn", "safetensors")
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in names if (found := _version(name))},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


class Run:
    """A run folder: `spec.json` + `model.safetensors` (the result), `teacher.*` (what it came from), `config.json`,
    `metrics.jsonl`, `environment.json`, and the stages' checkpoints under `stages/`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @classmethod
    def create(cls, folder: Path | str, config: dict[str, Any], resume: bool = False) -> Run:
        """Make the folder and record `config` and the environment.

        Raises ShoalError when a run is there already and `resume` is false, or when its configuration differs.
        """
        run = cls(folder)
        plain = json.loads(json.dumps(config, default=_plain))
        if (run.folder / "config.json").exists():
            run._check_same(plain, resume)
        else:
            run.write_json("config.json", plain)
        run.write_json("environment.json", environment() | {"command": sys.argv})
        return run

    def _check_same(self, config: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise ShoalError(f"found a run at {self.folder}; need --resume to go on with it, or another --out")
        old = read_json(self.folder / "config.json")
        odd = [key for key in {**old, **config} if old.get(key) != config.get(key)]
        if odd:
            raise ShoalError(
                f"found {odd[0]} = {old.get(odd[0])!r} in the run at {self.folder}; need the same configuration "
                f"to resume, not {config.get(odd[0])!r}"
            )

    def write_json(self, name: str, body: Any) -> None:
        """Write a JSON file of the run, atomically."""
        write_text(self.folder / name, json.dumps(body, indent=1, default=_plain))

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run. Raises ShoalError when it is missing or damaged."""
        return read_json(self.folder / name)

    def has(self, name: str) -> bool:
        """True when the run holds the file."""
        return (self.folder / name).exists()

    def checkpoint(self, stage: str) -> Checkpoint:
        """The checkpoint of one training stage."""
        return Checkpoint(self.folder / "stages", stage)

    def log(self, stage: str, row: dict[str, float]) -> None:
        """Append an epoch's row to `metrics.jsonl`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, **row}) + "\n")

    def recorder(self, stage: str, tensorboard: bool = False) -> Callable[[dict[str, float]], None]:
        """What `fit` calls with each epoch's row: the log, and TensorBoard if asked.

        Raises ShoalError when TensorBoard is asked for and not installed.
        """
        if not tensorboard:
            return lambda row: self.log(stage, row)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ShoalError(
                "found no TensorBoard; need it for --tensorboard; pip install shoal[tensorboard]"
            ) from error
        writer = SummaryWriter(str(self.folder / "tensorboard" / stage))

        def record(row: dict[str, float]) -> None:
            self.log(stage, row)
            for name, value in row.items():
                writer.add_scalar(name, value, int(row["epoch"]))
            writer.flush()

        return record

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl`; a last line cut off by a kill is left out."""
        if not self.has("metrics.jsonl"):
            return []
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for line in lines if (row := _parse(line)) is not None]

    def save_model(self, spec: Spec, model: nn.Module, name: str = "model") -> None:
        """Store a network as `<name>.json` (its spec) and `<name>.safetensors`."""
        write_tensors(self.folder / f"{name}.safetensors", dict(model.state_dict()))
        spec.save(self.folder / f"{name}.json")

    def load_model(self, name: str = "model", base: nn.Module | None = None) -> tuple[Spec, nn.Module]:
        """A stored network, in eval mode. Raises ShoalError when there is none."""
        if not self.has(f"{name}.json"):
            raise ShoalError(f"found no finished network {name!r} in {self.folder}; need a run that ended; resume it")
        spec = Spec.load(self.folder / f"{name}.json")
        return spec, load_model(spec, self.folder / f"{name}.safetensors", base).eval()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
