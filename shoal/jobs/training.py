"""A job that trains: one call of train, reduce, self-distill, inplace, distill or prune, which fills a run folder.

All of them have the same steps. `prepare` loads the data, and the job checks its network and options, before anything
is written. `Prepared.begin` makes the run folder with config.json. `Job.training` shows progress and yields the stages
in which the recipe trains. `Job.finish` writes summary.json and curves.png. The job's own module has its options,
checks, recipe and figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from shoal.data.augment import check_suits
from shoal.data.dataset import Dataset
from shoal.jobs.inputs import load_data
from shoal.jobs.options import Shared
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.progress import bars
from shoal.recipes.stages import Stages
from shoal.report import plot_curves
from shoal.storage.origins import Config, began
from shoal.storage.run import Run
from shoal.storage.summary import Figures, OnTest, Summary
from shoal.training.loop import join
from shoal.training.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """A job with loaded data and no run folder yet."""

    config: Config
    data: Dataset
    data_dir: Path | None
    shared: Shared

    def fingerprinted(self, plan: Path | None = None, **networks: nn.Module | None) -> Prepared:
        """The same job with fingerprints of data, plan and networks in its configuration (see `began`)."""
        return replace(self, config=began(self.config, self.data, self.data_dir, plan=plan, **networks))

    def begin(self) -> Job:
        """Make the run folder, or resume it. Under torchrun only the first process does so; the others wait for it.

        Raises ShoalError as `Run.create` does.
        """
        rank, size = join()
        run = self.shared.run(self.config) if rank == 0 else Run(self.shared.out)
        if size > 1:
            torch.distributed.barrier()
        settings = replace(
            self.shared.settings(self.config["seed"]),
            test_every_epoch=bool(self.config.get("test_every_epoch")),
            augment=self.config.get("augment"),
        )
        return Job(run, self.data, settings, self.config, self.shared.tensorboard)


@dataclass(frozen=True)
class Job:
    """A job with its run folder."""

    run: Run
    data: Dataset
    settings: Settings
    config: Config
    tensorboard: bool = False

    @contextmanager
    def training(self, epochs: Mapping[str, int], other: int = 1) -> Iterator[Stages]:
        """Yield the stages to train in, with a progress bar each. A stage not named in `epochs` has `other` epochs."""
        with bars(dict(epochs), other) as shown:
            yield Stages(self.data, self.settings, self.run, shown.listen, self.tensorboard)

    def figures(self, model: nn.Module, spec: Spec, tests: OnTest | None = None) -> Figures:
        """Test accuracy in percent, and counts, of one network, with those of all its epochs (`tests`), if any."""
        found = figures(model, self.data, spec, self.settings)
        found.update(tests or OnTest())
        return found

    def part(self, place: str, spec: Spec, model: nn.Module, tests: OnTest | None = None) -> Figures:
        """Save one classifier or width of the network as a run folder `place` in this run; returns its `figures`."""
        save_network(self.run.below(place), spec, model)
        return self.figures(model, spec, tests)

    def finish(self, summary: Summary, name: str = "summary.json") -> Summary:
        """Write the summary and draw the training curves."""
        summary.write(self.run, name)
        self.draw_curves()
        return summary

    def draw_curves(self) -> None:
        """Draw the training curves of all stages into curves.png."""
        plot_curves(self.run, self.run.folder / "curves.png")


def prepare(config: Config, data_dir: Path | None, shared: Shared) -> Prepared:
    """Load the data set of a configuration, from `data_dir` if given; writes nothing.

    Raises ShoalError for missing data, invalid settings, and an augmentation that does not suit the data.
    """
    shared.settings(config["seed"])  # raises
    data = load_data(config, data_dir, shared.device)
    if config.get("augment") is not None:
        check_suits(config["augment"], data.train.images)
    return Prepared(config, data, data_dir, shared)
