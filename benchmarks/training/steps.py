"""Training steps a second, eager, compiled and as CUDA graphs, and the share of the device's peak that they reach.

    python -m benchmarks.training.steps --device cuda --precision bf16 --out benchmarks/results/steps_gpu.json
    python -m benchmarks.training.steps --width 0.25 --batch 32 --seconds 4 --out benchmarks/results/steps_cpu.json

Ways of one network and the device's peak take turns, so ratios hold when the machine's speed drifts. The peak is that
of a large product of matrices or convolution in the same precision. Work is counted as 2 operations a multiply-add of
convolutions and linear layers, three times for what is trained and once for a teacher. A result of the same settings is
added to, so that `--networks` may take them one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training.training_overhead import synthetic
from shoal.errors import ShoalError, ShoalWarning
from shoal.graph.counting import cost
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes import inplace, shallow
from shoal.storage.environment import environment
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.optimiser import sgd
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from shoal.training.stepping import Recorded, Work, make_step

SHAPE, CLASSES = (3, 32, 32), 100
WIDTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class Case:
    """What is trained, what it learns from, and its multiply-adds an image, those of a teacher apart."""

    model: nn.Module
    objective: Objective
    macs: int
    teacher: nn.Module | None = None
    teacher_macs: int = 0


def multiply_adds(model: nn.Module) -> int:
    total = cost(trace(model, SHAPE))
    return total.macs + total.linear_macs


def plain(name: str, width: float) -> Case:
    model = assemble(Spec(name, CLASSES, SHAPE, width))
    return Case(model, Objective((cross_entropy(),)), multiply_adds(model))


def distilled(name: str, width: float) -> Case:
    """The fine-tuning stage of *Making Models Shallow Again*: cross-entropy, KD and PRAM over all ReLU sites."""
    case = plain(name, width)
    case.teacher = assemble(Spec(name, CLASSES, SHAPE, width))
    case.teacher_macs, spec = case.macs, Spec(name, CLASSES, SHAPE, width)
    case.objective = Objective(shallow.finetune_terms(shallow.paper(), relu_sites(case.model, SHAPE), spec))
    return case


def flexible(name: str, width: float, widths: tuple[float, ...] = ()) -> Case:
    """In-place distillation of all classifiers, each by all stronger ones."""
    options = inplace.Options("ta-m", widths=widths)
    spec = options.spec(Spec(name, CLASSES, SHAPE, width))
    model = assemble(spec)
    parts = [own for _, own in inplace.parts(spec, model).values()]
    macs = sum(map(multiply_adds, parts)) if widths else multiply_adds(model)
    return Case(model, inplace.objective("ta-m", len(parts), 0.8, 5.0), macs)


CASES: dict[str, tuple[Callable[[float], Case], int]] = {
    "ResNet18": (lambda w: plain("resnet18", w), 128),
    "WRN-22-8": (lambda w: plain("wrn-22-8", w), 128),
    "ResNet18 + KD + PRAM": (lambda w: distilled("resnet18", w), 128),
    "MSDNet-7": (lambda w: flexible("msdnet-7", w), 64),
    "slimmable MobileNetV1": (lambda w: flexible("mobilenetv1", w, WIDTHS), 128),
}
"""Networks and the papers' batch sizes."""


class Peak:
    """Operations a second of the better of a product of two matrices and a 3x3 convolution, both large.

    On some CPUs the one library reaches more than the other.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, big = settings, settings.device.startswith("cuda")
        kind = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        made = {"device": settings.device, "dtype": kind}
        self.size, batch, channels = (8192, 512, 512) if big else (2048, 8, 256)
        self.a, self.b = (torch.randn(self.size, self.size, **made) for _ in range(2))  # type: ignore[call-overload]
        self.x = torch.randn(batch, channels, 32, 32, **made)  # type: ignore[call-overload]
        self.weight = torch.randn(channels, channels, 3, 3, **made)  # type: ignore[call-overload]
        self.x, self.weight = (t.to(memory_format=torch.channels_last) for t in (self.x, self.weight))

    @torch.no_grad()
    def rate(self) -> float:
        """The best of four of each."""
        product, convolution = 2 * self.size**3, 2 * 9 * self.x.numel() * len(self.weight)
        works = {
            product: lambda: torch.mm(self.a, self.b),
            convolution: lambda: F.conv2d(self.x, self.weight, padding=1),
        }
        return max(count / seconds(work, 1, self.settings) for count, work in works.items() for _ in range(4))


def seconds(work: Callable[[], Any], count: int, settings: Settings) -> float:
    """Seconds for doing `work` so many times, the device's part too."""
    wait(settings)
    begun = time.perf_counter()
    for _ in range(count):
        work()
    wait(settings)
    return time.perf_counter() - begun


def wait(settings: Settings) -> None:
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()


class Way:
    """One network trained in one way on one batch."""

    def __init__(self, make: Callable[[float], Case], settings: Settings, width: float, batch: int) -> None:
        torch.manual_seed(0)
        self.case, self.settings, self.rates = make(width), settings, list[float]()
        networks = [network for network in (self.case.model, self.case.teacher) if network is not None]
        for network in networks:
            network.train().to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        teacher = self.case.teacher.eval() if self.case.teacher is not None else None
        optimiser = sgd(self.case.model, Schedule(1, 0.01, batch_size=batch), settings.device)
        self.case.objective.on_epoch_start(self.case.model, 0)  # as `fit` does
        self.step = make_step(Work(self.case.model, teacher, self.case.objective, (), optimiser, settings))
        self.x = torch.randn(batch, *SHAPE, device=settings.device).to(memory_format=torch.channels_last)
        self.y = torch.randint(0, CLASSES, (batch,), device=settings.device)

    def warm(self) -> float:
        """Seconds of the first steps, in which kernels are compiled and graphs recorded."""
        return seconds(self.go, 5, self.settings)

    def go(self) -> None:
        self.step(self.x, self.y)

    @property
    def operations(self) -> float:
        """Of a step."""
        return 2.0 * len(self.x) * (3 * self.case.macs + self.case.teacher_macs)


def measure(name: str, a: argparse.Namespace, ways: list[str], peak: Peak) -> dict[str, Any]:
    """Steps a second of every way that the machine has, over turns of about `a.seconds` in all."""
    make, batch = CASES[name]
    made: dict[str, Way] = {}
    begun: dict[str, float] = {}
    failed: dict[str, Any] = {}
    for way in ways:
        settings = Settings(device=a.device, precision=a.precision, step=way)
        try:
            made[way] = Way(make, settings, a.width, a.batch or batch)
            begun[way] = made[way].warm()
        except (ShoalError, ShoalWarning) as error:
            made.pop(way, None)
            failed[way] = {"error": str(error)}
    pace = max(seconds(way.go, 1, way.settings) for way in made.values())
    turns, count = 6, max(1, int(a.seconds / len(made) / 6 / pace))
    tops = []
    for turn in range(turns):
        tops.append(peak.rate())
        for way in list(made)[:: 1 if turn % 2 else -1]:
            made[way].rates.append(count / seconds(made[way].go, count, made[way].settings))
    rates = {way: statistics.median(found.rates) for way, found in made.items()}
    return failed | {
        way: {
            "steps_a_second": rates[way],
            "over_eager": statistics.median(x / y for x, y in zip(found.rates, made["eager"].rates, strict=True)),
            "share_of_peak": statistics.median(
                x * found.operations / y for x, y in zip(found.rates, tops, strict=True)
            ),
            "peak_flops": statistics.median(tops),
            "first_steps_s": begun[way],
            "recorded": isinstance(found.step, Recorded),
            "batch": len(found.x),
        }
        for way, found in made.items()
    }


def epochs(name: str, a: argparse.Namespace, ways: list[str]) -> dict[str, Any]:
    """Seconds of the third epoch of `fit` over `a.images` images, augmentation and evaluation on 200 with it."""
    make, batch = CASES[name]
    found, data = {}, synthetic(a.images).to(a.device)
    for way in ways:
        settings, case = Settings(device=a.device, precision=a.precision, step=way), make(a.width)
        plan = Schedule(3, 0.01, batch_size=a.batch or batch)
        history = fit(case.model, data, case.objective, plan, teacher=case.teacher, settings=settings)
        found[way] = {"seconds": history.rows[-1]["seconds"], "images": a.images, "batch": plan.batch_size}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", help="eager and others; all that the device has, unless given")
    parser.add_argument("--width", type=float, default=1.0, help="channel multiplier")
    parser.add_argument("--batch", type=int, help="instead of the papers' 128, and 64 for MSDNet")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measurement a network")
    parser.add_argument("--images", type=int, default=0, help="also time epochs of `fit` over so many (45,000, say)")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    on_gpu = a.device.startswith("cuda")
    ways = a.ways or ["eager", "compiled", *(["graph", "compiled-graph"] if on_gpu else [])]
    if ways[0] != "eager":
        parser.error(f"found --ways {' '.join(ways)}; need eager first, which the others are compared with")
    torch._inductor.config.force_disable_caches = True  # or the first steps' seconds would be those of an earlier run
    warnings.simplefilter("error", ShoalWarning)  # a way that is not there must not pass for one that is
    earlier = json.loads(a.out.read_text()) if a.out.exists() else {}
    body: dict[str, Any] = {
        "settings": {k: v for k, v in vars(a).items() if k not in ("out", "networks")},
        "environment": environment() | {"gpu": torch.cuda.get_device_name() if on_gpu else None},
        "steps": {},
        "epochs": {},
    }
    if earlier.get("settings") == body["settings"]:  # other networks, measured before: one a command fits a short lease
        body |= {"steps": earlier["steps"], "epochs": earlier["epochs"]}
    peak = Peak(Settings(device=a.device, precision=a.precision))
    for name in a.networks:
        body["steps"][name] = measure(name, a, ways, peak)
        if a.images:
            body["epochs"][name] = epochs(name, a, [way for way in ways if "error" not in body["steps"][name][way]])
        for way, row in body["steps"][name].items():
            if "error" in row:
                print(f"{name}, {way}: {row['error']}", flush=True)
                continue
            print(
                f"{name}, {way}: {row['steps_a_second']:.2f} steps a second, {row['over_eager']:.2f}x eager, "
                f"{row['share_of_peak']:.1%} of the peak, first steps {row['first_steps_s']:.0f} s",
                flush=True,
            )
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
