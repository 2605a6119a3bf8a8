"""Accuracy of a network's classifiers on a split."""

from __future__ import annotations

import torch
from torch import nn

from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError
from shoal.outputs import Tapped, unwrap
from shoal.training.batches import as_input
from shoal.training.settings import Settings
from shoal.training.stepping import explain_layout


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset, split: Split, settings: Settings | None = None, batch_size: int = 500
) -> list[float]:
    """Accuracy in percent on `split` of every exit of `model`, weakest first; the model runs in eval mode.

    Raises ShoalError for an empty split, and for a model that cannot take images in channels_last.
    """
    settings = settings or Settings()
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    network, right = Tapped(inner), None
    for i in range(0, len(split), batch_size):
        x, y = split.images[i : i + batch_size], split.labels[i : i + batch_size]
        try:
            with settings.autocast(), settings.exact():
                logits = network(as_input(data, x, settings)).logits
        except RuntimeError as error:
            raise explain_layout(error, inner) from error
        hits = torch.stack([(z.argmax(1) == y.to(z.device)).sum() for z in logits])
        right = hits if right is None else right + hits
    inner.train(was_training)
    if right is None:
        raise ShoalError("found an empty split to evaluate on; need at least one image")
    return [100.0 * float(r) / len(split) for r in right.tolist()]
