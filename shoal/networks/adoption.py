"""Networks that were trained elsewhere: their weights are fitted to a module, which is then a teacher like others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from torch import Tensor, nn

from shoal.data.dataset import Dataset, check_kind
from shoal.errors import ShoalError
from shoal.networks.assembly import assemble, with_output
from shoal.networks.spec import GIVEN, Spec
from shoal.storage.weight_files import PREFIXES, Weights
from shoal.surgery.tracing import check_trace

SHOWN = 5
"""Number of names that an error lists of each kind."""


def adopt(model: nn.Module, data: Dataset, output: int | None = None) -> tuple[Spec, nn.Module]:
    """The spec and the network of a trained module in memory, for `reduce` and all else that takes a teacher.

    `data` has the images that the module was trained for, with the mean and standard deviation that it expects. The
    network is a copy in eval mode. `output` is the number (from 0) of the output of its forward pass that has the
    logits; None means that all are logits, of one classifier or of several. Raises ShoalError when the module cannot be
    traced, computes something else once traced, or does not return one logit for each class.

    >>> spec, teacher = adopt(model, data)  # doctest: +SKIP
    """
    check_kind(data)
    spec = Spec(GIVEN, data.classes, data.shape, output=output)
    check_logits(model, spec)
    return spec, assemble(spec, model).eval()


def check_logits(model: nn.Module, spec: Spec) -> None:
    """Raise ShoalError unless `model` can be traced without a change, and returns `spec.classes` logits an image.

    Where `spec` names one output of `model`, the others are not checked.
    """
    graph = check_trace(with_output(model, spec), spec.shape)
    logits = graph[graph.outputs[-1]].shape
    if logits != (spec.classes,):
        raise ShoalError(
            f"found a result of shape {logits} for an image from {spec.base!r}; need {spec.classes} logits, one for "
            "each class; change its last layer, or give the number of classes that it has"
        )


def fit_weights(model: nn.Module, weights: Weights) -> list[str]:
    """Load weights of another training into `model`; returns what was adapted, as sentences.

    Prefixes of wrappers are removed, tensors are converted to the type that the model has, a tensor that is stored
    once and used under several names is found, and batch norms need no ``num_batches_tracked``. Raises ShoalError with
    the names that are missing, unexpected or of another shape, and for each the most similar name that there is.
    """
    own = model.state_dict(keep_vars=True)
    found, notes = _without_prefixes(weights.tensors, own)
    found |= {name: found[twin] for name, twin in _twins(own) if name not in found and twin in found}
    found |= {n: own[n].detach() for n in own if n.endswith("num_batches_tracked") and n not in found}
    _check_names(own, found, weights)
    casts = sorted({(str(found[n].dtype), str(own[n].dtype)) for n in own if found[n].dtype != own[n].dtype})
    notes += [
        f"converted weights from {old.removeprefix('torch.')} to {new.removeprefix('torch.')}" for old, new in casts
    ]
    model.load_state_dict({name: found[name].to(own[name].dtype) for name in own})
    return notes


def _without_prefixes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without prefixes that all their names have and no name of the model has; and what was removed."""
    found, notes = dict(tensors), []
    while prefix := next((p for p in PREFIXES if _is_shared(p, found) and not _is_shared(p, own)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        notes.append(f"removed the prefix {prefix!r} of every name")
    return found, notes


def _is_shared(prefix: str, names: Iterable[str]) -> bool:
    return all(name.startswith(prefix) for name in names)


def _twins(own: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names of one and the same tensor of a model."""
    places: dict[int, list[str]] = {}
    for name, tensor in own.items():
        places.setdefault(id(tensor), []).append(name)
    return [(a, b) for names in places.values() for a in names for b in names if a != b]


def _check_names(own: Mapping[str, Tensor], found: Mapping[str, Tensor], weights: Weights) -> None:
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    shaped = [name for name in own if name in found and found[name].shape != own[name].shape]
    parts = [
        _listed("missing", [_with_nearest(name, unexpected) for name in missing]),
        _listed("unexpected", [_with_nearest(name, missing) for name in unexpected]),
        _listed("of another shape", [f"{n} {tuple(found[n].shape)} instead of {tuple(own[n].shape)}" for n in shaped]),
    ]
    if missing or unexpected or shaped:
        raise ShoalError(
            f"found weights of another network at {weights.path}: {'; '.join(filter(None, parts))}; need those of this "
            "network; check its definition, the width and the number of classes"
        )


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"


def _with_nearest(name: str, others: Sequence[str]) -> str:
    near = get_close_matches(name, others, n=1)
    return f"{name} (nearest: {near[0]})" if near else name
