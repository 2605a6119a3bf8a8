"""The pruning sensitivity of each ReLU site (shallow eq. 1), from the densities of sparsely trained convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.surgery.sites import ReluSite


class DynamicRewiring:
    """Sparse training of the convolutions' weights at one global density; a hook of `fit`.

    `per_epoch` times an epoch the smallest weights of each layer are pruned, and equally many are regrown where the
    gradient's momentum is largest. Layers get regrown weights in proportion to the mean momentum of their non-zero
    weights, so the number of non-zero weights in the network stays constant. The prune rate falls from `rate` to 0 by a
    cosine. The source (Kundu et al., DNR) prunes once an epoch, at a rate of 0.5; short runs need more, or the
    densities hardly change. Raises ShoalError for a density outside (0, 1) and for a model without convolutions.
    """

    taps: tuple[str, ...] = ()
    recordable = True

    def __init__(
        self,
        model: nn.Module,
        epochs: int,
        density: float = 0.1,
        rate: float = 0.5,
        seed: int = 0,
        per_epoch: int = 1,
    ) -> None:
        if not 0 < density < 1:
            raise ShoalError(f"found proxy density {density}; need a value between 0 and 1; the paper's is 0.1")
        self.epochs, self.rate, self.per_epoch = epochs, rate, per_epoch
        self.rewired = 0
        generator = torch.Generator().manual_seed(seed)
        weights = conv_weights(model)
        if not weights:
            raise ShoalError("found no convolution to measure sensitivity on; need at least one before a ReLU")
        self.masks = {n: _random_mask(w, density, generator) for n, w in weights.items()}
        self.momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.weights = weights

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Move masks and momentum to the model's device."""
        self.weights = conv_weights(model)
        for name, weight in self.weights.items():
            self.masks[name] = self.masks[name].to(weight.device)
            self.momentum[name] = self.momentum[name].to(weight.device)

    def on_step(self, model: nn.Module, epoch: float) -> None:
        """Set pruned weights to 0, and prune and regrow if it is due."""
        with torch.no_grad():
            torch._foreach_mul_(list(self.weights.values()), [self.masks[name] for name in self.weights])
        if int(epoch * self.per_epoch) > self.rewired:
            self._rewire(model)

    def on_stepped(self, model: nn.Module) -> None:
        """Update the momentum with the gradients of all weights, pruned ones too."""
        found = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        if found:
            gathered = [self.momentum[name] for name in found]
            torch._foreach_mul_(gathered, 0.9)
            torch._foreach_add_(gathered, list(found.values()), alpha=0.1)

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Prune and regrow once more (at rate 0 after the last epoch). Returns the density, which is constant."""
        self._rewire(model)
        self.rewired = (epoch + 1) * self.per_epoch
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return {"density": kept / sum(mask.numel() for mask in self.masks.values())}

    def _rewire(self, model: nn.Module) -> None:
        self.rewired += 1
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * self.rewired / (self.epochs * self.per_epoch)))
        weights = conv_weights(model)
        with torch.no_grad():
            freed = sum(self._prune(name, weight, rate) for name, weight in weights.items())
            self._grow(freed)
            for name, weight in weights.items():
                weight.mul_(self.masks[name])

    def _prune(self, name: str, weight: Tensor, rate: float) -> int:
        mask = self.masks[name]
        count = int(rate * int(mask.sum()))
        score = torch.where(mask, weight.abs(), torch.inf).flatten()
        mask.view(-1)[score.argsort(stable=True)[:count]] = False
        return count

    def _grow(self, freed: int) -> None:
        # In proportion to mean momentum; what does not fit in a full layer goes to the others.
        share = {n: float(self.momentum[n].abs()[m].mean()) if m.any() else 0.0 for n, m in self.masks.items()}
        room = {name: int((~mask).sum()) for name, mask in self.masks.items()}
        grown = _share_out(freed, share, room)
        for name, count in grown.items():
            mask = self.masks[name]
            score = torch.where(mask, -1.0, self.momentum[name].abs()).flatten()
            mask.view(-1)[score.argsort(descending=True, stable=True)[:count]] = True

    def densities(self) -> dict[str, float]:
        """eta_theta: the fraction of non-zero weights of each convolution."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs besides the model."""
        masks = {f"mask.{k}": v for k, v in self.masks.items()}
        moments = {f"momentum.{k}": v for k, v in self.momentum.items()}
        return masks | moments | {"rewired": torch.tensor(self.rewired)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""
        for name in self.masks:
            self.masks[name].copy_(state[f"mask.{name}"])
            self.momentum[name].copy_(state[f"momentum.{name}"])
        self.rewired = int(state["rewired"])


def _random_mask(weight: Tensor, density: float, generator: torch.Generator) -> Tensor:
    count = max(1, round(density * weight.numel()))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[torch.randperm(weight.numel(), generator=generator)[:count]] = True
    return mask.view(weight.shape).to(weight.device)


def _share_out(total: int, share: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Integers that add up to `total`, about proportional to `share` and at most `room` each."""
    grown = dict.fromkeys(room, 0)
    while (left := total - sum(grown.values())) > 0:
        open_ = [n for n in room if grown[n] < room[n]]
        scale = sum(share[n] for n in open_)
        for name in sorted(open_, key=lambda n: -share[n]):
            wanted = left * share[name] / scale if scale else left / len(open_)
            take = min(room[name] - grown[name], max(1, int(wanted)), total - sum(grown.values()))
            grown[name] += take
    return grown


def conv_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight [out, in / groups, kh, kw] of every convolution, by module name."""
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def magnitude_densities(model: nn.Module, density: float = 0.1) -> dict[str, float]:
    """eta_theta estimated without training: the fraction of each convolution's weights that are large.

    A weight is large if it is among the fraction `density` of the network's weights with the largest absolute values.
    Cheaper and coarser than `DynamicRewiring`; used for planning, not in the paper. Raises ShoalError for a model
    without convolutions.
    """
    weights = {name: weight.detach().abs().flatten().float() for name, weight in conv_weights(model).items()}
    if not weights:
        raise ShoalError("found no convolution to measure sensitivity on; need at least one before a ReLU")
    everything = torch.cat(list(weights.values()))
    count = max(1, round(density * everything.numel()))
    least = everything.kthvalue(everything.numel() - count + 1).values
    return {name: float((weight >= least).float().mean()) for name, weight in weights.items()}


def pruning_sensitivity(densities: Mapping[str, float], sites: Sequence[ReluSite]) -> dict[str, float]:
    """eta_alpha = 1 - eta_theta for every site (shallow eq. 1), where eta_theta is the density of its convolution.

    `densities` has one value in [0, 1] per convolution. Raises ShoalError for a site whose convolution has no density.
    """
    missing = [site.name for site in sites if site.conv not in densities]
    if missing:
        raise ShoalError(
            f"found no convolution density for {missing[:3]}; need one for each site; give the sensitivities by hand"
        )
    return {site.name: 1.0 - densities[str(site.conv)] for site in sites}
