"""What masks, widths, exits and the loop cost: steps of the recipes against bare ones, and `fit` against a bare loop.

    python -m benchmarks.training.training_overhead --out benchmarks/results/training_overhead.json
    python -m benchmarks.training.training_overhead --only flexible --width 1 --batch 64 --out OUT.json

Both sides alternate in one run, so the ratio holds when the machine's speed drifts; teacher forward in both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.data.augment import augment_batch
from shoal.data.dataset import Dataset, Split
from shoal.distillation.losses import kd
from shoal.distillation.neighbours import Neighbourhood, NeighbourTeacher, neighbours
from shoal.models import build
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.outputs import forward
from shoal.recipes import inplace
from shoal.reduction.budget import allocate
from shoal.reduction.learners import LEARNERS
from shoal.reduction.learners.search import Problem, Search
from shoal.storage.environment import environment
from shoal.surgery.normal_form import normalise
from shoal.surgery.sites import relu_sites
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.optimiser import sgd
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from shoal.training.stepping import Work

SHAPE = (3, 32, 32)
STEPS = 1000
"""Steps an epoch that the searches are told of: many more than are timed, so that none comes to its end."""


def step_of(
    model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, search: Search | None = None
) -> Callable[[], None]:
    """One step of `fit` with the teacher's forward pass, and with all that a search adds to it."""
    hooks = search.hooks if search else ()
    objective = Objective((cross_entropy(0.5), kd(0.5), *(search.terms if search else ())))
    work, moments = as_fit_does(model, objective, teacher, hooks), itertools.count()
    call(hooks, "on_epoch_start", model, 0)

    def step() -> None:
        call(hooks, "on_step", model, next(moments) / STEPS)
        work(x, y)

    return step


def as_fit_does(
    model: nn.Module, objective: Objective, teacher: nn.Module | None = None, hooks: Sequence[Any] = ()
) -> Work:
    """The step of `fit` by itself."""
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = sgd(model, Schedule(1, 0.01), "cpu")
    return Work(model, teacher, objective, hooks, optimiser, Settings())


def call(hooks: Sequence[Any], name: str, *arguments: Any) -> None:
    for hook in hooks:
        getattr(hook, name, lambda *_: None)(*arguments)


def alternate(first: Callable[[], None], second: Callable[[], None], count: int) -> dict[str, float]:
    """Medians of paired timings and of their ratio, first over second."""
    rows = []
    for i in range(count + 2):
        pair = []
        # The order flips every pair, so that neither side always runs on the other's warm caches.
        for run in (first, second) if i % 2 else (second, first):
            begun = time.perf_counter()
            run()
            pair.append(time.perf_counter() - begun)
        rows.append(tuple(pair if i % 2 else reversed(pair)))
    rows = rows[2:]
    ratio = statistics.median(a / b for a, b in rows)
    a, b = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"ratio": ratio, "first_s": a, "second_s": b, "pairs": count}


def network(width: float) -> nn.Module:
    return build("resnet18", 100, width=width)


def search_step(masks: str, width: float, batch: int, count: int) -> dict[str, float]:
    """A step of one learner's search at a tenth of the ReLUs against a plain step, teacher forward in both."""
    torch.manual_seed(0)
    plain, teacher = normalise(network(width)), network(width).eval()
    x, y = torch.randn(batch, *SHAPE), torch.randint(0, 100, (batch,))
    sites = relu_sites(plain, SHAPE)
    share = partial(allocate, sites, {s.name: 1.0 for s in sites})
    total, plan = sum(s.relus for s in sites) // 10, Schedule(4, 0.01, batch_size=batch)
    search = LEARNERS[masks](
        Problem(plain, teacher, sites, SHAPE, total, plan, STEPS, 0, lambda: iter([(x, y)]), share)
    )
    x, teacher = x.to(memory_format=torch.channels_last), teacher.to(memory_format=torch.channels_last)
    return alternate(step_of(search.model, teacher, x, y, search), step_of(plain, teacher, x, y), count)


FLEXIBLE: dict[str, tuple[str, inplace.Options]] = {
    "msdnet": ("msdnet-7", inplace.Options("ta-m")),
    "slimmable": ("mobilenetv1", inplace.Options("ta-m", widths=(0.25, 0.5, 0.75, 1.0))),
    "slimmable_resnet": ("resnet18", inplace.Options("ta-m", widths=(0.25, 0.5, 0.75, 1.0))),
}


def passes(networks: Sequence[nn.Module], x: Tensor, y: Tensor) -> Callable[[], None]:
    """The bare forward and backward passes of plain networks: cross-entropy of every classifier, no optimiser."""
    for model in networks:
        model.train().to(memory_format=torch.channels_last)

    def run() -> None:
        for model in networks:
            model.zero_grad(set_to_none=True)
            torch.stack([F.cross_entropy(z, y) for z in forward(model, x).logits]).sum().backward()

    return run


def flexible_step(name: str, width: float, batch: int, count: int) -> dict[str, float]:
    """A whole step of in-place distillation, optimiser too, against the bare passes of the same networks.

    Those of a slimmable network are the plain networks of its widths.
    """
    torch.manual_seed(0)
    base, options = FLEXIBLE[name]
    spec = options.spec(Spec(base, 100, SHAPE, width))
    model = assemble(spec)
    classifiers = inplace.names(spec, model)
    plain = [own for _, own in inplace.parts(spec, model).values()] if spec.widths else [assemble(spec)]
    x, y = torch.randn(batch, *SHAPE).to(memory_format=torch.channels_last), torch.randint(0, 100, (batch,))
    objective = inplace.objective(options.method, len(classifiers), 0.8, 5.0)
    return alternate(whole_step(model.train(), objective, x, y), passes(plain, x, y), count)


def whole_step(model: nn.Module, objective: Objective, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One step of `fit`, without a teacher."""
    return partial(as_fit_does(model, objective), x, y)


OSAKD = {
    "osakd-cnn1, 3x32x32, batch 64": ("osakd-cnn1", (3, 32, 32), 64),
    "osakd-cnn2, 1x28x28, batch 64": ("osakd-cnn2", (1, 28, 28), 64),
    "resnet32-projection, 3x32x32, batch 128": ("resnet32-projection", (3, 32, 32), 128),
}
"""The paper's networks at its batch sizes."""


def osakd_step(model: str, shape: tuple[int, ...], batch: int, count: int) -> dict[str, float]:
    """A step with the labels of 8 neighbours in the mini-batch over a plain one of the same network."""
    torch.manual_seed(0)
    x = torch.randn(batch, *shape).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))
    own = neighbours(NeighbourTeacher(Neighbourhood(8), 10), 0.1)
    sides = (Objective((cross_entropy(0.9), own)), Objective((cross_entropy(),)))
    networks = [normalise(build(model, 10, channels=shape[0])).train() for _ in sides]
    taught, plain = (whole_step(n, o, x, y) for n, o in zip(networks, sides, strict=True))
    return alternate(taught, plain, count)


def synthetic(count: int) -> Dataset:
    g = torch.Generator().manual_seed(0)
    split = lambda n: Split(  # noqa: E731
        torch.randint(0, 256, (n, *SHAPE), generator=g, dtype=torch.uint8), torch.randint(0, 100, (n,), generator=g)
    )
    return Dataset("random", split(count), split(200), split(1), 100, (0.5,) * 3, (0.25,) * 3, "crop-flip")


def bare(model: nn.Module, data: Dataset, batch: int) -> None:
    """The same work by hand: augmentation, normalisation, cross-entropy, SGD, one evaluation."""
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.train), generator=generator)
    model.train()
    for i in range(len(data.train) // batch):
        mine = order[i * batch : (i + 1) * batch]
        x = data.normalise(augment_batch(data.train.images[mine], data.augment, generator))
        loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), data.train.labels[mine])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    evaluate(model, data, data.val)


def loop(width: float, batch: int, count: int, images: int) -> dict[str, float]:
    data = synthetic(images)
    torch.manual_seed(0)
    ours = normalise(build("resnet18", 100, width=width))
    theirs = normalise(ours).to(memory_format=torch.channels_last)
    objective, schedule = Objective((cross_entropy(),)), Schedule(1, 0.01, batch_size=batch)
    return alternate(
        lambda: fit(ours, data, objective, schedule, settings=Settings()) and None,
        lambda: bare(theirs, data, batch),
        count,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--masks", nargs="+", choices=LEARNERS, default=["senet", "snl", "autorep-linear", "autorep"])
    parser.add_argument("--only", choices=("masks", "flexible", "osakd"), help="one part alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    body: dict[str, Any] = {
        "settings": {k: v for k, v in vars(a).items() if k != "out"},
        "environment": environment(),
    }
    if a.only in (None, "masks"):
        body |= {
            "masked_step_over_plain_step": search_step("random", a.width, a.batch, a.pairs),
            "search_step_over_plain_step": {m: search_step(m, a.width, a.batch, a.pairs) for m in a.masks},
            "fit_over_bare_loop": loop(a.width, a.batch, a.pairs, 10 * a.batch),
        }
    if a.only in (None, "osakd"):
        body["osakd_step_over_plain_step"] = {name: osakd_step(*case, a.pairs) for name, case in OSAKD.items()}
    if a.only in (None, "flexible"):
        steps = {name: flexible_step(name, a.width, a.batch, a.pairs) for name in FLEXIBLE}
        body["flexible_step_over_bare_passes"] = steps
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({k: v for k, v in body.items() if "over" in k}, indent=1))


if __name__ == "__main__":
    main()
