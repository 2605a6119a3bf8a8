"""Partial ReLU layers: a ReLU at the kept positions, the identity elsewhere; and how positions are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from shoal.budget import Budget
from shoal.errors import ShoalError
from shoal.outputs import Outputs, unwrap
from shoal.sites import ReluSite, is_relu_site
from shoal.surgery import Lowered, replace


class MaskedReLU(nn.Module):
    """ReLU where `mask` ([C, H, W] bool) is true, identity elsewhere (shallow section 4, SENet).

    Computed as one clamp from below by 0 or minus infinity, which costs what a plain ReLU does.
    """

    mask: Tensor
    floor: Tensor
    is_relu_site = True

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())
        self.register_buffer("floor", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())
        self.refresh()

    def refresh(self) -> None:
        """Derive the clamp's floor from the mask; called after the mask changed."""
        zero = torch.zeros((), device=self.mask.device)
        floor = torch.where(self.mask, zero, zero - torch.inf)[None]
        self.floor = floor.contiguous(memory_format=_layout(self.floor))

    def set_mask(self, mask: Tensor) -> None:
        """Exchange the kept positions, on the module's own device."""
        self.mask.copy_(mask)
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape; ShoalError when [C, H, W] is not the mask's."""
        if x.shape[1:] != self.mask.shape:
            raise ShoalError(
                f"found an activation of shape {tuple(x.shape[1:])} at a mask of shape {tuple(self.mask.shape)}; "
                "need the input size that the masks were learned for"
            )
        return torch.clamp(x, min=self.floor.to(x.dtype))

    def to_node(self) -> Lowered:
        """A `relu` node with its mask."""
        return "relu", {}, {"mask": self.mask}


def _layout(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def random_masks(budget: Budget, sites: Sequence[ReluSite], generator: torch.Generator) -> dict[str, Tensor]:
    """Exactly `budget` positions a site, uniformly at random."""
    return {
        s.name: top_k(torch.rand(s.shape, generator=generator, dtype=torch.float64), budget.counts[s.name])
        for s in sites
    }


def top_k(score: Tensor, count: int, granularity: str = "pixel") -> Tensor:
    """A bool mask of exactly `count` ones at the highest scores ([C, H, W]).

    With granularity ``channel`` whole channels are taken by their mean score, the last one filled by pixel.
    """
    if granularity == "channel" and score.dim() == 3:  # a value of a linear layer is a channel by itself
        rank = score.mean((1, 2)).argsort(descending=True, stable=True).argsort(stable=True)
        span = float(score.max() - score.min()) + 1.0
        score = score - rank.to(score)[:, None, None] * 2 * span
    elif granularity not in ("pixel", "channel"):
        raise ShoalError(f"found granularity {granularity!r}; need 'pixel' or 'channel'")
    # A stable sort gives exactly `count` ones whatever ties there are.
    order = score.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = True
    return mask.view(score.shape)


def add_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of `model` whose named ReLU sites are masked ([C, H, W] bool each). Raises ShoalError on no match."""
    if not masks:
        raise ShoalError("found no masks to add; need at least one ReLU site")
    for name in masks:
        if not is_relu_site(model.get_submodule(name) if name in dict(model.named_modules()) else nn.ReLU()):
            raise ShoalError(f"found no ReLU site {name!r}; need a name that relu_sites gives")
    return replace(model, {name: MaskedReLU(mask) for name, mask in masks.items()})


def masked_sites(model: nn.Module) -> dict[str, MaskedReLU]:
    """The masked ReLU modules of `model` by site name."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, MaskedReLU)}


def check_budget(model: nn.Module, budget: Budget) -> None:
    """Raise ShoalError unless every site keeps exactly its budget."""
    for name, module in masked_sites(model).items():
        kept = int(module.mask.sum())
        if kept != budget.counts[name]:
            raise ShoalError(f"found {kept} ReLUs kept at {name}; need {budget.counts[name]}")


class DifferenceLearner:
    """SENet's mask search: per site the top-k positions of |teacher - student|, summed over an epoch.

    A hook of `fit`: masks found in one epoch hold in the next. `fit` evaluates and keeps the best weights before it
    calls `on_epoch_end`, so a kept checkpoint holds the masks that it was trained and judged with.
    """

    def __init__(self, budget: Budget, granularity: str = "pixel") -> None:
        self.budget, self.granularity = budget, granularity
        self.taps = tuple(budget.counts)
        self.sums: dict[str, Tensor] = {}

    def on_batch(self, student: Outputs, teacher: Outputs | None) -> None:
        """Add one batch's absolute differences. Raises ShoalError without a teacher."""
        if teacher is None:
            raise ShoalError("found no teacher; need an all-ReLU network to learn masks from")
        with torch.no_grad():
            for name in self.taps:
                gap = (teacher.taps[name].float() - student.taps[name].float()).abs().sum(0)
                self.sums[name] = self.sums[name].add_(gap) if name in self.sums else gap

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Install the masks for the next epoch; returns `mask_change`, the normalised Hamming distance."""
        changed = 0
        for name, module in masked_sites(model).items():
            new = top_k(_reduced(self.sums[name]), self.budget.counts[name], self.granularity)
            changed += int((new != module.mask).sum())
            module.set_mask(new)
        self.sums = {}
        return {"mask_change": changed / (2 * self.budget.total)}


def _reduced(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
