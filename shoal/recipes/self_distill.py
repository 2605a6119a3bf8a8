"""*Self-Distillation* (Zhang et al., TPAMI'21): shallow classifiers in one network, taught by its deeper ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from shoal.data.augment import CLOUD_POLICIES, POLICIES
from shoal.data.clouds import is_cloud
from shoal.distillation.paths import DISTANCES, PATHS, self_features, self_kd
from shoal.errors import ShoalError
from shoal.exits.attention import add_adapters, feature_taps
from shoal.exits.classifiers import check_one_classifier, count_exits, depth_order
from shoal.exits.points import CHOSEN, FIXED, exit_points
from shoal.networks.assembly import assemble, with_output
from shoal.networks.spec import EXIT_KINDS, Spec
from shoal.recipes import beside
from shoal.recipes.lessons import Lesson
from shoal.recipes.stages import Stages, check_teacher
from shoal.surgery.tracing import check_trace
from shoal.training.loop import History
from shoal.training.objective import Objective, Term, Weight, cross_entropy, switched
from shoal.training.schedule import SCHEDULES, Schedule


@dataclass(frozen=True)
class Preset:
    """The schedule of the network and its baseline, and the loss (section 3.1, eq. 3 to 5).

    For a shallow classifier, `alpha` is the weight of the divergence and 1 - `alpha` that of the cross-entropy;
    `feature_weight` is the paper's lambda. Both are 0 in the last `release` epochs. `mean` divides the loss by the
    number of classifiers. `squared` multiplies divergences by the temperature squared. With `adapters`, each student's
    features pass a linear layer before they are compared. `skipped` are shallow classifiers, counted back from the
    final one, that learn no features.
    """

    schedule: Schedule
    alpha: float = 0.6
    feature_weight: float = 0.04
    temperature: float = 3.0
    squared: bool = True
    mean: bool = True
    path: str = "deepest"
    distance: str = "squared"
    adapters: bool = False
    skipped: tuple[int, ...] = ()
    release: int = 5
    augment: str | None = None
    select: str = "val"


def quick(epochs: int = 16, batch: int = 64) -> Preset:
    """A short cosine schedule for small data, with the data set's augmentation.

    The loss is the paper's (`paper`), except that alpha is 0.3 and divergences are not multiplied by the temperature
    squared, as in the public code. With so few epochs, the paper's divergence would outweigh the labels: see
    docs/results.md. The public code's whole loss is that of `reference_code`.
    """
    schedule = Schedule(epochs, 0.1, kind="cosine", warmup=0.5, batch_size=batch)
    return Preset(schedule, alpha=0.3, squared=False, release=max(1, epochs // 16))


def paper() -> Preset:
    """Section 4.1 for CIFAR-100. The paper gives no temperature; this one is the public code's."""
    return Preset(SCHEDULES["self-distillation"], augment="crop-flip-autoaugment")


def paper_modelnet() -> Preset:
    """Section 4.1 for ModelNet. AutoAugment is for images, so clouds get the data set's augmentation."""
    return Preset(Schedule(100, 0.1, (30, 60, 90), batch_size=256))


def paper_imagenet() -> Preset:
    """Section 4.1 for ImageNet, with its usual weight decay and augmentation.

    The paper gives no weight decay, and uses AutoAugment, whose policy for ImageNet is not built.
    """
    schedule = Schedule(100, 0.1, (30, 60, 90), batch_size=256, weight_decay=1e-4)
    return Preset(schedule, augment="resized-crop-flip")


def reference_code() -> Preset:
    """What the authors' public code does where it differs from the paper (see docs/papers/self_distillation.md)."""
    return Preset(
        Schedule(250, 0.1, (83, 166, 240)),
        alpha=0.3,
        feature_weight=0.03,
        squared=False,
        mean=False,
        distance="batch-norm",
        adapters=True,
        skipped=(1,),
        release=0,
        augment="crop-flip-autoaugment-cutout",
        select="test",
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "quick": quick,
    "paper": paper,
    "paper-modelnet": paper_modelnet,
    "paper-imagenet": paper_imagenet,
    "reference-code": reference_code,
}


AUTO = "auto"
"""Value of `scheme` and `kind` that chooses by the network's inputs, images or point clouds."""


@dataclass(frozen=True)
class Options:
    """Where to add classifiers, of which kind, and values that replace the preset's (None: the preset's)."""

    scheme: str = field(default=AUTO, metadata={"values": (*FIXED, *CHOSEN)})
    """Where to add classifiers. downsample: before each change of resolution; every-block and every-layer: after each;
    uniform, shallow and deep: --count of them, after equal numbers of blocks, after the first blocks or after the last
    ones. auto means downsample, and for point clouds uniform with two classifiers."""
    count: int | None = None
    """Number of shallow classifiers for the schemes uniform, shallow and deep; 3 if left out."""
    after: tuple[str, ...] = ()
    """Add a classifier after this submodule, such as layer2 (repeatable). Replaces --scheme."""
    kind: str = AUTO
    """Kind of shallow classifier: attention (the paper's most accurate; cannot run in private), attention-se,
    attention-cbam or attention-bam (the same with the attention module of SENet, CBAM or BAM; cannot run in private),
    aligned (without an attention module; can run in private), plain (one layer) or pooled (pooled features and an MLP).
    auto means attention, or pooled for point clouds."""
    path: str | None = field(default=None, metadata={"values": PATHS})
    """Which classifiers teach a shallow one: the final one (deepest), the mean of all (ensemble), the next deeper one
    (transitive), or all deeper ones, as mean (dense) or sum (dense-sum); the preset's if left out."""
    alpha: float | None = None
    """Weight of the divergence from the teaching classifier, 0 to 1; the preset's if left out."""
    feature_weight: float | None = None
    """Weight of the distance between features (lambda), 0 or more; the preset's if left out."""
    augment: str | None = field(default=None, metadata={"cli": None})
    """Augmentation of training images; the preset's if left out."""
    beside: str | None = field(default=None, metadata={"values": beside.BESIDE})
    """Learn from an additional teacher."""
    baseline: bool = True
    """Also train the network without shallow classifiers, with the same schedule, to compare."""

    def settled(self, shape: tuple[int, ...]) -> Options:
        """The options with each ``auto`` replaced by its meaning for inputs of `shape` [C, H, W].

        Images: attention exits before each change of resolution. Point clouds have no resolutions: pooled exits after
        equal numbers of blocks, two of them if no number is given, so that there are Table 4's three classifiers.
        """
        cloud = is_cloud(shape)
        kind = ("pooled" if cloud else "attention") if self.kind == AUTO else self.kind
        scheme = ("uniform" if cloud else "downsample") if self.scheme == AUTO else self.scheme
        two = cloud and self.scheme == AUTO and self.count is None and not self.after
        return replace(self, kind=kind, scheme=scheme, count=2 if two else self.count)

    def applied(self, preset: Preset) -> Preset:
        """`preset` with the values that these options replace."""
        names = ("path", "alpha", "feature_weight", "augment")
        return replace(preset, **{name: v for name in names if (v := getattr(self, name)) is not None})


@dataclass
class Result:
    """The trained network with its classifiers from weak to strong, its spec, and the baseline (None: not trained)."""

    spec: Spec
    model: nn.Module
    baseline: nn.Module | None
    histories: dict[str, History] = field(default_factory=dict)


def distill(
    spec: Spec,
    options: Options,
    preset: Preset,
    stages: Stages,
    base: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Result:
    """Add shallow classifiers to the plain network of `spec`, and train them by its deeper ones.

    The network and the baseline start from the weights of `base`, or from new ones. `teacher` is the trained network
    that `options.beside` needs (kd, at). Raises ShoalError for impossible options, StoppedError when the time is up.
    """
    preset, options = options.applied(preset), options.settled(spec.shape)
    grown = check_options(options, preset, spec, base, teacher)
    stages = stages.changed(select=preset.select, augment=preset.augment or stages.settings.augment)
    baseline = _baseline(stages, spec, base, preset) if options.baseline else None
    plain = assemble(spec, base)
    torch.manual_seed(stages.settings.seed)
    lesson = beside.lesson(options.beside, lambda: taught_network(grown, base, preset), plain, teacher, spec.shape)
    return Result(grown, _taught(stages, lesson, preset.schedule).eval(), baseline, stages.histories)


def check_options(
    options: Options,
    preset: Preset,
    spec: Spec,
    base: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Spec:
    """The spec with its exits. Raises ShoalError, before any training, for impossible options or networks."""
    options = options.settled(spec.shape)
    check_teacher(spec)
    beside.check(options.beside, teacher)
    _check_loss(preset, options)
    if base is not None:
        check_trace(with_output(base, spec), spec.shape)
    plain = assemble(spec, base)
    check_one_classifier(plain, spec.base)
    if options.after and options.count is not None:
        raise ShoalError("found a count of exits and their sites; need one of them; leave the count out")
    chosen = options.after or exit_points(plain, spec.shape, options.scheme, options.count)
    after = depth_order(plain, chosen)
    grown = replace(spec, exits=after, exit_kind=options.kind)
    beside.lesson(options.beside, lambda: taught_network(grown, plain, preset), plain, teacher, spec.shape)
    return grown


def _check_loss(preset: Preset, options: Options) -> None:
    known: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("path", preset.path, PATHS),
        ("distance", preset.distance, DISTANCES),
        ("exits of kind", options.kind, EXIT_KINDS),
        ("augmentation", preset.augment or "none", POLICIES + CLOUD_POLICIES),
    )
    for what, value, values in known:
        if value not in values:
            raise ShoalError(f"found {what} {value!r}; need one of {', '.join(values)}; choose one")
    if options.path is not None and not preset.alpha and not preset.feature_weight:
        raise ShoalError("found a path and nothing that is taught along it; need alpha or a feature weight; give one")
    if not 0 <= preset.alpha <= 1 or preset.feature_weight < 0:
        raise ShoalError(
            f"found alpha {preset.alpha:g} and a feature weight of {preset.feature_weight:g}; need an alpha from 0 to "
            "1 and a weight of at least 0; correct them"
        )
    if options.kind == "plain" and preset.feature_weight:
        raise ShoalError(
            "found plain exits, which have no aligned features; need a feature weight of 0 with them; set it, or use "
            "aligned exits"
        )
    if (preset.alpha or preset.feature_weight) and preset.release >= preset.schedule.epochs:
        raise ShoalError(
            f"found {preset.schedule.epochs} epochs, the last {preset.release} of them without distillation; need "
            "more; train longer, or set alpha and the feature weight to 0"
        )


def _baseline(stages: Stages, spec: Spec, base: nn.Module | None, preset: Preset) -> nn.Module:
    """Train the plain network and return it."""
    torch.manual_seed(stages.settings.seed)
    model = assemble(spec, base)
    stages.fit("baseline", model, Objective((cross_entropy(),)), preset.schedule)
    return model


def _taught(stages: Stages, lesson: Lesson, schedule: Schedule) -> nn.Module:
    """Train the lesson's network and return it without the parts that only the losses use."""
    stages.fit(
        "self-distillation", lesson.model, Objective(lesson.terms), schedule, teacher=lesson.teacher,
        settings={"exit": lesson.exit},
    )  # fmt: skip
    return lesson.cut(lesson.model)


def taught_network(spec: Spec, base: nn.Module | None, preset: Preset) -> tuple[nn.Module, tuple[Term, ...]]:
    """A network with its shallow classifiers and the adapters that the preset's loss needs, and its loss terms.

    `spec` has the exits. The network starts from the weights of `base`, or from new ones. Raises ShoalError as
    `objective_terms` does.
    """
    model, adapted = assemble(spec, base), dict[int, str]()
    if preset.adapters and preset.feature_weight:
        model, adapted = _adapted(model, preset)
    return model, objective_terms(model, preset, adapted)


def _adapted(model: nn.Module, preset: Preset) -> tuple[nn.Module, dict[int, str]]:
    """The model with a linear layer for each classifier that learns features, and the layers' names by exit."""
    taps = feature_taps(model)
    taught = [i for i in range(len(taps) - 1) if i not in _skipped(preset, len(taps))]
    model, names = add_adapters(model, [taps[i] for i in taught])
    return model, dict(zip(taught, names, strict=True))


def _skipped(preset: Preset, count: int) -> tuple[int, ...]:
    return tuple(count - 1 - back for back in preset.skipped)


def objective_terms(model: nn.Module, preset: Preset, adapted: Mapping[int, str] | None = None) -> tuple[Term, ...]:
    """The loss terms of eq. 3 to 5 for a network with exits.

    `adapted` maps an exit to the submodule that its features pass before they are compared. Raises ShoalError when the
    preset has a feature weight but skips all shallow classifiers.
    """
    count = count_exits(model)
    share, last = 1 / count if preset.mean else 1.0, preset.schedule.epochs - preset.release

    def weight(before: float, after: float = 0.0) -> Weight:
        return switched(share * before, share * after, last)

    terms = [cross_entropy(share)]
    terms += [cross_entropy(weight(1 - preset.alpha, 1.0), i, f"exit{i}_cross_entropy") for i in range(count - 1)]
    if preset.alpha:
        terms.append(self_kd(preset.path, count, weight(preset.alpha), preset.temperature, squared=preset.squared))
    if preset.feature_weight:
        terms.append(
            self_features(
                preset.path,
                feature_taps(model),
                weight(preset.feature_weight),
                form=preset.distance,
                adapted=adapted,
                skipped=_skipped(preset, count),
            )
        )
    return tuple(terms)
