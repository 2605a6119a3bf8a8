"""The command that shows the whole way. `app` gives it its name."""

from __future__ import annotations

from shoal.cli.fields import expanded
from shoal.cli.options import Json, show
from shoal.jobs import demo as job
from shoal.report import comparison_table


@expanded
def demo(request: job.Request, json: Json = False) -> None:
    """Train, reduce, fold and privately run a network on scikit-learn's digits, in under 6 minutes on two cores."""
    summary = job.demo(request)
    show(summary.as_json(), json, lambda: comparison_table(summary))
