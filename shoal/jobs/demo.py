"""What `shoal demo` does: the whole way on scikit-learn's digits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.jobs.reduce import fit_stages
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.progress import bars, say
from shoal.recipes import shallow
from shoal.recipes.stages import train_teacher
from shoal.report import plot_comparison
from shoal.storage.run import Run
from shoal.training.settings import Settings

DEMO = shallow.Options(budget=1900, d_th=0.12)
DEMO_WIDTH = 0.25


def demo(out: Path, overwrite: bool, images: int, seed: int) -> dict[str, Any]:
    """The whole job on scikit-learn's digits."""
    from shoal.measuring import two_parties as demonstration
    from shoal.private.transport.certs import make_certificates

    settings = Settings(seed=seed)
    _check_demo(settings, images)
    _clean(out, overwrite)
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:  # keys never lie in a run folder, nor outlive the demo
        make_certificates(Path(folder))
        run, data, summary = _reduced_digits(out, settings)
        for name, which in (("baseline", "teacher"), ("reduced", "model")):
            network = load_network(run, which)[1]
            summary[name] |= demonstration.measure(out / name, network, data, Path(folder), images, say)
    summary["agreement"] = demonstration.agreement_of(summary["reduced"])
    run.write_json("summary.json", summary)
    plot_comparison(summary, out / "comparison.png")
    return summary


def _check_demo(settings: Settings, images: int) -> None:
    """Raise ShoalError, before minutes of training, where the private part could not follow."""
    from shoal.private.serving.spu_link import require_spu

    settings.check()
    if images < 1:
        raise ShoalError(f"found {images} images to query; need 1 or more; leave --images out for 32")
    require_spu()


def _clean(out: Path, overwrite: bool) -> None:
    from shoal.measuring import two_parties as demonstration

    try:
        demonstration.clean(out, overwrite)
    except OSError as error:
        raise ShoalError(f"found no folder to write at {out} ({error}); need one; choose another --out") from error


def _reduced_digits(out: Path, settings: Settings) -> tuple[Run, Dataset, dict[str, Any]]:
    """Train the demo's teacher and reduce it: the run with both, the data, and the summary so far."""
    data = load("digits", seed=settings.seed)
    plan = shallow.quick(teacher=20, sensitivity=3, mask=8, finetune=30)
    spec = Spec("resnet10", data.classes, data.shape, DEMO_WIDTH)
    run = Run.create(out, {"command": "demo", "data": "digits", "seed": settings.seed, "options": DEMO, "preset": plan})
    say(f"training an all-ReLU {spec.base} (width {spec.width}) on digits")
    with bars({"teacher": plan.teacher.epochs}) as shown:
        teacher, _ = train_teacher(spec, data, plan.teacher, settings, run=run, listen=shown.listen)
    save_network(run, spec, teacher, "teacher")
    say(f"reducing it to {DEMO.budget:,} ReLUs: sensitivity, masks, gated branches and auxiliary classifier")
    return run, data, fit_stages(run, spec, teacher, data, DEMO, plan, settings)
