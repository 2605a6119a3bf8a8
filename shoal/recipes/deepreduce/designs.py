"""DeepReDuce's designs (Jha et al., ICML'21, section 3): culling, thinning, reshaping, criticality, and the grid.

Culling drops all ReLUs of a stage; the stem's go with those of the first stage. Thinning drops every other ReLU layer
of a stage that is left. Reshaping scales the numbers of channels and the resolution of the feature maps.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shoal.errors import ShoalError
from shoal.networks.spec import Spec
from shoal.reduction.dropping import culled, drop_blocks, drop_relus, spare_blocks, thinned
from shoal.surgery.sites import ReluSite, relu_sites

WEIGHT = 0.07
"""w of equation 1."""

RESHAPES = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5))
"""(alpha, rho) of the grid's reshaped designs, in the paper's order: 2, 4 and 8 times fewer ReLUs."""

STEM, NOTHING = "Conv1", "NoReLUs"
"""Names of the designs that keep the ReLUs of the stem only, and none at all (Table 1)."""

_NAME = re.compile(
    rf"(?P<stages>{STEM}|{NOTHING}|S\d+(RT)?(\+S\d+(RT)?)*)(-a(?P<width>[\d.]+))?(-r(?P<resolution>[\d.]+))?(?P<one>-one)?"
)


@dataclass(frozen=True)
class Design:
    """One network of the grid: the numbers of its culled and thinned stages, and its reshaping.

    `width` is the paper's alpha and `resolution` its rho, both above 0 and at most 1; the base network is built with
    them. With `one_block`, each stage that has ReLUs keeps only its first block. The stem's ReLUs go as soon as a stage
    is culled, except with `stem`.
    """

    culled: tuple[int, ...] = ()
    thinned: tuple[int, ...] = ()
    width: float = 1.0
    resolution: float = 1.0
    one_block: bool = False
    stem: bool = False

    def name(self, stages: Collection[int]) -> str:
        """The design's name in the paper's style, for a network with these stages: ``S2RT+S3-a0.5-r0.5``.

        It names the stages that keep ReLUs; ``RT`` marks a thinned stage. If there is none, the name is ``Conv1`` or
        ``NoReLUs``. ``-one`` means one block a stage; the paper marks these designs with a star.
        """
        kept = "+".join(f"S{k}RT" if k in self.thinned else f"S{k}" for k in sorted(set(stages) - {0, *self.culled}))
        kept = kept or (STEM if self.stem else NOTHING)
        width = f"-a{self.width:g}" if self.width != 1 else ""
        resolution = f"-r{self.resolution:g}" if self.resolution != 1 else ""
        return kept + width + resolution + ("-one" if self.one_block else "")


def parse(name: str, stages: Collection[int]) -> Design:
    """The design that `Design.name` writes as `name`.

    Raises ShoalError for text of another form, stages that the network does not have, and scales outside (0, 1].
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ShoalError(
            f"found design {name!r}; need the stages that keep ReLUs, such as S2RT+S3-a0.5-r0.5, or {STEM} or "
            f"{NOTHING}; correct the name"
        )
    alone = match["stages"] in (STEM, NOTHING)
    texts = [] if alone else match["stages"].split("+")
    kept = [(int(text.strip("SRT")), text.endswith("RT")) for text in texts]
    known, names = set(stages) - {0}, [k for k, _ in kept]
    if not set(names) <= known or len(set(names)) != len(names):
        raise ShoalError(f"found design {name!r}; need some of the stages {sorted(known)}, each once; correct the name")
    thin = tuple(sorted(k for k, is_thinned in kept if is_thinned))
    scales = (_scale(match["width"], name), _scale(match["resolution"], name))
    gone = tuple(sorted(known - set(names)))
    return Design(gone, thin, *scales, one_block=match["one"] is not None, stem=match["stages"] == STEM)


def _scale(text: str | None, name: str) -> float:
    try:
        value = 1.0 if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ShoalError(f"found scale {text!r} in design {name!r}; need a number above 0, at most 1; such as a0.5")
    return value


def drops(design: Design, model: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the blocks and of the ReLU sites that `design` drops from `model`, for images of `shape` [C, H, W].

    Raises ShoalError for a stage that `model` does not have, when no stage has a second block to drop, and for a design
    that keeps the stem's ReLUs when the stem has none.
    """
    kept = {site.stage for site in relu_sites(model, shape)} - {0, *design.culled}
    blocks = spare_blocks(model, shape, kept) if design.one_block else ()
    if design.one_block and not blocks:
        raise ShoalError("found no second residual block in any stage; need one to drop; leave out one_block (-one)")
    sites = relu_sites(drop_blocks(model, shape, blocks) if blocks else model, shape)
    stem = {site.name for site in sites if design.stem and site.stage == 0}
    if design.stem and not stem:
        raise ShoalError(f"found no ReLUs in the stem; need some for {STEM}; name stages that have ReLUs")
    gone = tuple(name for name in culled(sites, design.culled) if name not in stem)
    return blocks, gone + thinned(sites, set(design.thinned) & kept)


def apply(design: Design, model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A copy of `model` without the ReLUs and blocks that `design` drops.

    `model` must already have the design's width and resolution. Raises ShoalError as `drops` does.
    """
    blocks, relus = drops(design, model, shape)
    return drop_relus(drop_blocks(model, shape, blocks) if blocks else model, relus)


def design_spec(spec: Spec, design: Design, model: nn.Module) -> Spec:
    """The spec of `design` on the base network of `spec`; `model` is that network at full size.

    Stages are found in the full network, because in a narrower or smaller one two stages may have maps of equal shape.
    Raises ShoalError as `drops` does.
    """
    blocks, relus = drops(design, model, spec.shape)
    width, resolution = spec.width * design.width, spec.resolution * design.resolution
    return replace(spec, width=width, resolution=resolution, dropped_blocks=blocks, dropped=relus)


def criticality(accuracy: Mapping[int, float], sites: Sequence[ReluSite], weight: float = WEIGHT) -> dict[int, float]:
    """Criticality of each stage by equation 1: (Acc[S_k] - min Acc) / (thousands of ReLUs of S_k)^w.

    `accuracy` holds, for each stage, the accuracy in percent of the network that has the ReLUs of this stage only and
    was trained by distillation. ReLUs count in thousands, as in the paper's Table 3. Raises ShoalError for a stage
    without ReLUs.
    """
    relus = {stage: sum(s.relus for s in sites if s.stage == stage) for stage in accuracy}
    empty = [stage for stage, count in relus.items() if not count]
    if empty or not accuracy:
        raise ShoalError(f"found accuracies of stages {sorted(accuracy)}; need stages that have ReLUs; mend the list")
    least = min(accuracy.values())
    return {k: (a - least) / (relus[k] / 1000) ** weight for k, a in accuracy.items()}


def only(stage: int, stages: Collection[int]) -> Design:
    """The design that keeps the ReLUs of `stage` only. It is trained to measure the stage's criticality."""
    return Design(tuple(sorted(set(stages) - {0, stage})))


def grid(critical: Mapping[int, float]) -> tuple[Design, ...]:
    """The 5 (D - 1) designs of section 3.5, for D stages with these criticalities.

    Stages are culled one after another, the least critical first; the most critical one stays. For each number of
    culled stages there are five designs: without thinning, thinned, and thinned with half the channels, with half the
    resolution, and with both.
    """
    order, designs = sorted(critical, key=lambda stage: critical[stage]), list[Design]()
    for count in range(1, len(order)):
        gone, left = tuple(sorted(order[:count])), tuple(sorted(order[count:]))
        thin = Design(gone, left)
        designs += [Design(gone), thin, *(replace(thin, width=w, resolution=r) for w, r in RESHAPES)]
    return tuple(designs)


def positions(text: str, count: int) -> tuple[int, ...]:
    """Indices, from 0, of the designs that ``3`` or ``2-5`` means in a grid of `count`; empty for any other text.

    The text counts from 1. Raises ShoalError for places outside the grid.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        return ()
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= count:
        raise ShoalError(f"found designs {text!r}; need places from 1 to {count} in the grid; correct the numbers")
    return tuple(range(first - 1, last))
