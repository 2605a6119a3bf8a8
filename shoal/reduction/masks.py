"""Masked ReLU layers: a ReLU at the kept positions, the identity elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function

from shoal.errors import ShoalError
from shoal.graph.graph import Lowered
from shoal.outputs import unwrap
from shoal.reduction.budget import Budget
from shoal.surgery.normal_form import replace
from shoal.surgery.sites import ReluSite, is_relu_site


def where_positive(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient` where x > 0, else 0; all of the same shape.

    Uses PyTorch's backward kernel for ReLU, which is many times faster on a CPU than `torch.where`.
    """
    passed: Tensor = torch.ops.aten.threshold_backward(gradient, x, 0)
    return passed


def beside(values: Tensor, x: Tensor) -> Tensor:
    """`values` [C, H, W] in the dtype and memory format of x [N, C, H, W], so that kernels are vectorised."""
    return values.to(x.dtype)[None].contiguous(memory_format=_layout(x))[0]


class MaskedClamp(Function):
    """max(x, floor) with a floor of 0 at kept positions (ReLU) and of minus infinity elsewhere (identity)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: Tensor) -> Tensor:
        """Clamp x [N, ...] from below by `floor`, which is broadcast to it."""
        result = torch.clamp(x, min=floor)
        # The backward pass needs no more than the result, which the next layer saves anyway.
        ctx.save_for_backward(result, floor)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient by x. PyTorch's own for a clamp by a tensor is many times slower on a CPU."""
        result, floor = ctx.saved_tensors
        return passed_on(gradients[0], result, floor), None


def passed_on(gradient: Tensor, x: Tensor, floor: Tensor) -> Tensor:
    """The gradient of max(x, floor) by x, where each floor is 0 or minus infinity.

    `x` may also be the result max(x, floor), which gives the same gradient.
    """
    # With weights of 0 and 1 `lerp` chooses one of its two ends.
    return where_positive(gradient, x).lerp_(gradient, floor.isinf().to(x.dtype))


class MaskedReLU(nn.Module):
    """ReLU where `mask` ([C, H, W] bool) is true, identity elsewhere (shallow section 4, SENet).

    Computed as one clamp from below by 0 or minus infinity, which is as fast as a plain ReLU. While `watched` is true,
    the last input is stored in `seen`.
    """

    mask: Tensor
    floor: Tensor
    is_relu_site = True

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.watched, self.seen = False, torch.empty(0)
        self.register_buffer("mask", mask.bool())
        self.register_buffer("floor", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())
        self.refresh()

    def refresh(self) -> None:
        """Recompute the clamp's floor from the mask; to be called after the mask changed."""
        zero = torch.zeros((), device=self.mask.device)
        floor = torch.where(self.mask, zero, zero - torch.inf)[None]
        if self.floor.shape == floor.shape and self.floor.device == floor.device:
            self.floor.copy_(floor)  # in place, because a recorded step reads this memory
        else:
            self.floor = floor.contiguous(memory_format=_layout(self.floor))

    def set_mask(self, mask: Tensor) -> None:
        """Set the kept positions to those of `mask` (bool [C, H, W]); it may be on another device."""
        self.mask.copy_(mask)
        MaskedReLU.refresh(self)  # not the subclass's refresh, which reads other buffers and so waits for the GPU

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape. Raises ShoalError when [C, H, W] is not the mask's shape."""
        self.check(x)
        if self.watched:
            self.seen = x.detach()
        floor = self.floor.to(x.dtype)
        return MaskedClamp.apply(x, floor) if x.requires_grad else torch.clamp(x, min=floor)

    def check(self, x: Tensor) -> None:
        """Raise ShoalError unless x is [N, C, H, W] with the mask's shape [C, H, W]."""
        if x.shape[1:] != self.mask.shape:
            raise ShoalError(
                f"found an activation of shape {tuple(x.shape[1:])} at a mask of shape {tuple(self.mask.shape)}; "
                "need the input size that the masks were learned for"
            )

    def to_node(self) -> Lowered:
        """A `relu` node with its mask."""
        return "relu", {}, {"mask": self.mask}


def _layout(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def random_masks(
    budget: Budget, sites: Sequence[ReluSite], generator: torch.Generator, granularity: str = "pixel"
) -> dict[str, Tensor]:
    """Random masks, bool [C, H, W] by site, with exactly the budget's count at each site.

    All positions (or with granularity ``channel`` all channels, see `top_k`) are equally likely.
    """
    scores = {s.name: torch.rand(s.shape, generator=generator, dtype=torch.float64) for s in sites}
    return {name: top_k(score, budget.counts[name], granularity) for name, score in scores.items()}


def top_k(score: Tensor, count: int, granularity: str = "pixel") -> Tensor:
    """A bool mask of the shape of `score` ([C, H, W] or [C]), true at exactly the `count` highest scores.

    With granularity ``channel`` the channels with the highest mean scores are kept whole, and the last of them in part
    by score. Raises ShoalError for another granularity than ``pixel`` and ``channel``.
    """
    _check_granularity(granularity)
    if granularity == "channel" and score.dim() == 3:  # after a linear layer each value is a channel
        rank = score.mean((1, 2)).argsort(descending=True, stable=True).argsort(stable=True)
        span = float(score.max() - score.min()) + 1.0
        score = score - rank.to(score)[:, None, None] * 2 * span
    # Sorting keeps exactly `count` positions even if scores are equal.
    order = score.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = True
    return mask.view(score.shape)


def global_top_k(scores: Mapping[str, Tensor], total: int, granularity: str = "pixel") -> dict[str, Tensor]:
    """Bool masks [C, H, W] by site, true at exactly the `total` highest scores of all sites together.

    With granularity ``channel`` the channels with the highest mean scores are kept whole, and the last of them in part
    by score. Equal scores are taken in the order of sites. Positions with score minus infinity are taken last and do
    not count in a channel's mean. Raises ShoalError for another granularity than ``pixel`` and ``channel``.
    """
    _check_granularity(granularity)
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = flat.argsort(descending=True, stable=True)
    if granularity == "channel":
        means = [_channel_means(s) for s in scores.values()]
        rank = torch.cat(means).argsort(descending=True, stable=True).argsort(stable=True)
        sizes = [s[0].numel() for s in scores.values() for _ in range(len(s))]
        order = order[rank.repeat_interleave(torch.tensor(sizes, device=rank.device))[order].argsort(stable=True)]
        order = order[flat[order].isneginf().to(torch.uint8).argsort(stable=True)]
    kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    kept[order[:total]] = True
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _channel_means(score: Tensor) -> Tensor:
    """Mean of each channel's finite scores, [C]; minus infinity for a channel that has none."""
    rows = score.flatten(1) if score.dim() == 3 else score[:, None]
    return rows.where(~rows.isneginf(), torch.nan).nanmean(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _check_granularity(granularity: str) -> None:
    if granularity not in ("pixel", "channel"):
        raise ShoalError(f"found granularity {granularity!r}; need 'pixel' or 'channel'; choose one")


def add_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of `model` with a `MaskedReLU` at each named ReLU site; masks are bool [C, H, W].

    Raises ShoalError when there are no masks and for a name that is not that of a ReLU site.
    """
    if not masks:
        raise ShoalError("found no masks to add; need at least one ReLU site")
    for name in masks:
        if not is_relu_site(model.get_submodule(name) if name in dict(model.named_modules()) else nn.ReLU()):
            raise ShoalError(f"found no ReLU site {name!r}; need a name that relu_sites gives")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return replace(model, {name: MaskedReLU(mask.to(device)) for name, mask in masks.items()})


def masked_sites(model: nn.Module) -> dict[str, MaskedReLU]:
    """The masked ReLU modules of `model` by site name."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, MaskedReLU)}


def check_budget(model: nn.Module, budget: Budget) -> None:
    """Raise ShoalError unless every masked site of `model` keeps exactly its budget."""
    for name, module in masked_sites(model).items():
        kept = int(module.mask.sum())
        if kept != budget.counts[name]:
            raise ShoalError(f"found {kept} ReLUs kept at {name}; need {budget.counts[name]}")
