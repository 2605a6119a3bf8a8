"""`shoal analyse`."""

from __future__ import annotations

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show
from shoal.jobs import analyse as job


@expanded
def analyse(request: job.Request, json: Json = False) -> None:
    """Study a network's exits, features and gradients; each study writes a plot and a CSV file.

    The studies are those of the self-distillation paper. flat-minimum: accuracy and loss under noise on the parameters;
    gradients: their size by layer and exit; separability and pca: the features of each exit; attention: the attention
    maps, if the network has any; attribution: integrated gradients; thresholds: number and accuracy of the images above
    each confidence; computation: the MACs that exits add in training. CSV files count exits from 0.
    """
    body = job.analyse(request)
    rows = [[name, units.count(row["rows"]), ", ".join(row["files"]) or row["note"]] for name, row in body.items()]
    head = ["study", "rows", "files, or why there are none"]
    show(body, json, lambda: grid(str(request.run), head, rows, texts=(0, 2)))
