"""The job of `shoal demo`: the whole pipeline on scikit-learn's digits."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.jobs.reduce import fit_stages
from shoal.jobs.training import Job
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.progress import say
from shoal.recipes import shallow
from shoal.recipes.stages import train_teacher
from shoal.report import plot_comparison
from shoal.storage.origins import Config
from shoal.storage.run import Run
from shoal.storage.summary import Summary
from shoal.training.settings import Settings

DEMO = shallow.Options(budget=1900, d_th=0.12)
DEMO_WIDTH = 0.25


@dataclass(frozen=True)
class Request:
    """The options of `shoal demo`."""

    out: Path = Path("runs/demo")
    """The run folder to write."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    images: int = 20
    """Number of test images that are classified privately, between two processes on this machine."""
    seed: int = 0
    """Seed of initial weights, batches and the validation split."""


def demo(request: Request) -> Summary:
    """Train a network on scikit-learn's digits, reduce it, and classify images privately with both networks.

    Raises ShoalError for fewer than three images, without the package spu, and for a folder that cannot be written.
    """
    from shoal.measuring import two_parties as demonstration
    from shoal.private.transport.certs import make_certificates

    settings, out = Settings(seed=request.seed), request.out
    _check_demo(settings, request.images)
    _clean(out, request.overwrite)
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:  # keys are never stored in a run folder
        make_certificates(Path(folder))
        job, summary = _reduced_digits(out, settings)
        networks = {"baseline": load_network(job.run, "teacher")[1], "reduced": load_network(job.run, "model")[1]}
        found = demonstration.measure(networks, job.data, out, Path(folder), request.images, say)
        for name, figures in found.items():
            summary.side(name).update(figures)
    summary.agreement = demonstration.agreement_of(summary.reduced)
    summary.write(job.run)
    plot_comparison(summary, out / "comparison.png")
    return summary


def _check_demo(settings: Settings, images: int) -> None:
    """Raise ShoalError, before minutes of training, if the private queries could not run afterwards."""
    from shoal.measuring.two_parties import check_images
    from shoal.private.serving.spu_link import require_spu

    settings.check()
    check_images(images)
    require_spu()


def _clean(out: Path, overwrite: bool) -> None:
    from shoal.measuring import two_parties as demonstration

    try:
        demonstration.clean(out, overwrite)
    except OSError as error:
        raise ShoalError(f"found no folder to write at {out} ({error}); need one; choose another --out") from error


def _reduced_digits(out: Path, settings: Settings) -> tuple[Job, Summary]:
    """Train the demo's teacher and reduce it; returns the job, whose run holds both networks, and its summary."""
    data = load("digits", seed=settings.seed)
    plan = shallow.quick(teacher=20, sensitivity=3, mask=8, finetune=30)
    spec = Spec("resnet10", data.classes, data.shape, DEMO_WIDTH)
    config: Config = {"command": "demo", "data": "digits", "seed": settings.seed, "options": DEMO, "preset": plan}
    job = Job(Run.create(out, config), data, settings, config)
    say(f"training an all-ReLU {spec.base} (width {spec.width}) on digits")
    with job.training({"teacher": plan.teacher.epochs}) as stages:
        teacher, _ = train_teacher(spec, plan.teacher, stages)
    save_network(job.run, spec, teacher, "teacher")
    say(f"reducing it to {DEMO.budget:,} ReLUs: sensitivity, masks, gated branches and auxiliary classifier")
    return job, fit_stages(job, spec, teacher, DEMO, plan)
