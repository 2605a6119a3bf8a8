"""`shoal demo`."""

from __future__ import annotations

from shoal.cli.fields import expanded
from shoal.cli.options import Json, show
from shoal.jobs import demo as job
from shoal.report import comparison_table


@expanded
def demo(request: job.Request, json: Json = False) -> None:
    """Train, reduce and privately run a network on scikit-learn's digits.

    It takes less than 3 minutes on two cores, and downloads nothing.
    """
    summary = job.demo(request)
    show(summary.as_json(), json, lambda: comparison_table(summary))
