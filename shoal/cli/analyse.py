"""The command that analyses a network. `app` gives it its name."""

from __future__ import annotations

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show
from shoal.jobs import analyse as job


@expanded
def analyse(request: job.Request, json: Json = False) -> None:
    """Study a network as the self-distillation paper does; each study is a plot and a CSV file.

    flat-minimum: accuracy and loss under noise on the parameters; gradients: their size by layer and exit;
    separability and pca: features of each exit; attention: attention maps, if there are any; attribution: integrated
    gradients; thresholds: number and accuracy of images above a confidence. CSV files count exits from 0.
    """
    body = job.analyse(request)
    rows = [[name, units.count(row["rows"]), ", ".join(row["files"]) or row["note"]] for name, row in body.items()]
    head = ["study", "rows", "files, or why there are none"]
    show(body, json, lambda: grid(str(request.run), head, rows, texts=(0, 2)))
