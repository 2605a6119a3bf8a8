"""Test accuracies as some papers report them: the largest of all epochs, and that of the last epoch.

The largest one is selected on the test set, so it is higher than what the same network would have on new images. It
stands beside the accuracy of the epoch that validation selects, and never replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.storage.summary import OnTest

KEY = "test_accuracy"


def row_of_tests(accuracy: Sequence[float]) -> dict[str, float]:
    """What an epoch's row has of the test accuracies of all classifiers, weakest first, in percent."""
    return {KEY: accuracy[-1]} | {f"{KEY}_exit{i}": a for i, a in enumerate(accuracy[:-1])}


def on_test(rows: Sequence[Mapping[str, float]], select: int | None = -1, classifier: int = -1) -> OnTest:
    """The largest and the last test accuracy of `classifier` in the rows of `fit`; empty if the rows have none.

    The epoch of the largest one is that in which the classifier `select` has its largest test accuracy; None is the
    mean over all classifiers. The first of several equal epochs counts.
    """
    if not rows or KEY not in rows[0]:
        return OnTest()
    accuracies = [_accuracies(row) for row in rows]
    scores = [sum(own) / len(own) if select is None else own[select] for own in accuracies]
    best = scores.index(max(scores))
    return OnTest(
        largest_on_test=accuracies[best][classifier],
        largest_on_test_epoch=int(rows[best]["epoch"]),
        last_on_test=accuracies[-1][classifier],
    )


def _accuracies(row: Mapping[str, float]) -> list[float]:
    exits = sum(key.startswith(f"{KEY}_exit") for key in row)
    return [*(row[f"{KEY}_exit{i}"] for i in range(exits)), row[KEY]]
