"""`Run`: one folder per run, with everything that made a result and everything needed to use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypedDict

from shoal.errors import ShoalError
from shoal.storage.checkpoint import Checkpoint
from shoal.storage.environment import environment
from shoal.storage.files import append_line, read_json, write_text
from shoal.storage.origins import Config, check_origins, difference, fingerprints, updated
from shoal.storage.tensors import checksum, fit_files, has_tensors, read_tensors


class Epoch(TypedDict, total=False):
    """A row of `metrics.jsonl`: one epoch of a stage. `accuracy` is in percent, on the split that selects the best.

    Rows also have each loss, by the name of its term.
    """

    stage: str
    epoch: int
    accuracy: float


def summary_writer() -> Any:
    """TensorBoard's `SummaryWriter` class. Raises ShoalError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ShoalError("found no TensorBoard; need it for --tensorboard; pip install shoal[tensorboard]") from error
    return SummaryWriter


class Run:
    """A run folder: result, configuration, metrics, environment and checkpoints.

    `spec.json` and `model.safetensors` are the result, `teacher.*` is the network that it came from, and `config.json`,
    `metrics.jsonl` and `environment.json` say how it was made. Checkpoints of the stages are in `stages/`.

    With `shard_bytes`, weights are written in files of at most that many bytes: `model.index.json`, and the files that
    it names, replace `model.safetensors`. Every run reads both.
    """

    def __init__(self, folder: Path | str, shard_bytes: int | None = None) -> None:
        self.folder, self.shard_bytes = Path(folder), shard_bytes

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @classmethod
    def create(cls, folder: Path | str, config: Config, resume: bool = False, shard_bytes: int | None = None) -> Run:
        """Make the folder, and record `config` and the environment; `shard_bytes` is not recorded.

        A resumed run may have its data and input runs at other paths (see `origins`); `config.json` names the latest
        paths. Their contents must have the fingerprints that `config.json` has, if any.

        Raises ShoalError when a run is there and `resume` is false, when its configuration or fingerprints differ, and
        when the folder holds files but no run.
        """
        run = cls(folder, shard_bytes)
        plain = as_json(config)
        if run.has("config.json"):
            run._go_on(plain, resume)
        else:
            run.check_free()
            run.write_json("config.json", plain)
        run.write_json("environment.json", environment() | {"command": sys.argv})
        if shard_bytes is not None:
            for place in (run.folder, run.folder / "stages"):  # files that were written with another limit
                fit_files(place, shard_bytes)
        return run

    def below(self, place: str, config: Config | None = None) -> Run:
        """Create or resume a run in the subfolder `place`, with the same limit on file sizes.

        `config` is by default this run's. Raises ShoalError as `create` does.
        """
        own = self.read_json("config.json") if config is None else config
        return Run.create(self.folder / place, own, True, self.shard_bytes)

    def check_free(self) -> None:
        """Raise ShoalError unless the folder is new or empty, so that no file in it is lost."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ShoalError(f"found a file at {self.folder}; need a new folder; choose another --out")
        try:
            # A kill at the very start leaves the scratch file of the configuration.
            found = self.folder.is_dir() and {p.name for p in self.folder.iterdir()} - {".config.json.tmp"}
        except OSError as error:
            raise ShoalError(f"found no readable folder at {self.folder} ({error}); choose another --out") from error
        if found:
            raise ShoalError(
                f"found files at {self.folder} ({min(found)}) and no run; need a new or empty folder; "
                "choose another --out"
            )

    def _go_on(self, config: Config, resume: bool) -> None:
        """Check that the run may resume with `config`, and record the paths in it. Raises ShoalError if it may not."""
        if not resume:
            raise ShoalError(f"found a run at {self.folder}; need --resume to go on with it, or another --out")
        body = self.read_json("config.json")
        old = body if isinstance(body, dict) else {}
        odd = difference(old, config)
        if odd is not None:
            raise ShoalError(
                f"found {odd} = {old.get(odd)!r} in the run at {self.folder}; need the same configuration "
                f"to resume, not {config.get(odd)!r}"
            )
        check_origins(self.folder, self._known(old), config)
        if updated(old, config) != old:
            self.write_json("config.json", updated(old, config))

    def _known(self, config: Config) -> Config:
        """Fingerprints of the run's inputs. Runs of earlier versions have none, but their teacher's can be computed."""
        found = fingerprints(config)
        if "teacher" not in found and config.get("teacher") is not None and self.has("teacher.json"):
            found["teacher"] = checksum(read_tensors(self.folder / "teacher.safetensors"), {})
        return found

    def config(self) -> Config:
        """The configuration. Raises ShoalError when data or seed are missing in it."""
        body = self.read_json("config.json")
        kinds = {"data": (str,), "seed": (int,), "limit": (int, type(None)), "data_dir": (str, type(None))}
        body = body if isinstance(body, dict) else {}
        bad = [name for name, kind in kinds.items() if not isinstance(body.get(name), kind)]
        if bad:
            raise ShoalError(
                f"found no usable {bad[0]!r} in {self.folder / 'config.json'}; need the file that shoal wrote; "
                "put it back or make the run again"
            )
        return body

    def write_json(self, name: str, body: Any) -> None:
        """Write a JSON file of the run, atomically. Raises ShoalError when it cannot be written."""
        write_text(self.folder / name, json.dumps(body, indent=1, default=_plain))

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run. Raises ShoalError when it is missing or damaged."""
        return read_json(self.folder / name)

    def has(self, name: str) -> bool:
        """True when the run has the file; weights may be in several files."""
        path = self.folder / name
        return has_tensors(path) if path.suffix == ".safetensors" else path.exists()

    def checkpoint(self, stage: str) -> Checkpoint:
        """The checkpoint of one training stage."""
        return Checkpoint(self.folder / "stages", stage, self.shard_bytes)

    def log(self, stage: str, row: dict[str, float]) -> None:
        """Append an epoch's row to `metrics.jsonl`. Raises ShoalError when it cannot be written."""
        append_line(self.folder / "metrics.jsonl", json.dumps({"stage": stage, **row}))

    def recorder(self, stage: str, tensorboard: bool = False) -> Callable[[dict[str, float]], None]:
        """A function that records an epoch's row in `metrics.jsonl`, and in TensorBoard if asked; `fit` calls it.

        Raises ShoalError when TensorBoard is asked for and not installed.
        """
        if not tensorboard:
            return lambda row: self.log(stage, row)
        writer = summary_writer()(str(self.folder / "tensorboard" / stage))

        def record(row: dict[str, float]) -> None:
            self.log(stage, row)
            for name, value in row.items():
                writer.add_scalar(name, value, int(row["epoch"]))
            writer.flush()

        return record

    def metrics(self) -> list[Epoch]:
        """The rows of `metrics.jsonl`; if a kill made an epoch run twice, only its last row.

        A line that a kill cut off is left out. Raises ShoalError when a row has no stage or accuracy.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise ShoalError(
                f"found no readable metrics at {path} ({error}); need the file that shoal wrote"
            ) from error
        rows = [row for line in lines if (row := _parse(line)) is not None]
        for row in rows:
            _check_row(row, path)
        return list({(row["stage"], row.get("epoch", -i)): row for i, row in enumerate(rows, 1)}.values())


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _check_row(row: Any, path: Path) -> None:
    sound = isinstance(row, dict) and isinstance(row.get("stage"), str)
    if not sound or not isinstance(row.get("accuracy"), (int, float)):
        raise ShoalError(f"found a row without stage and accuracy in {path}; need the rows that shoal wrote; mend it")


def as_json(config: Config) -> Config:
    """A configuration as it is in `config.json`, with JSON types only."""
    return dict(json.loads(json.dumps(config, default=_plain)))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
