"""`shoal adopt`."""

from __future__ import annotations

from shoal.cli.fields import expanded
from shoal.cli.options import Json, pairs, show
from shoal.jobs import adopt as job


@expanded
def adopt(request: job.Request, json: Json = False) -> None:
    """Make a run of a network that is trained already, to reduce, compile or evaluate it.

    It loads the weights into the network, measures the test accuracy, and shows it beside the accuracy that the file
    itself states, if any. The run remembers how images are normalised; artifacts that are compiled from it apply the
    same to the images of a query.

    The network may also be an ONNX file, which has its own weights. Its logits are compared with onnxruntime's on test
    images, and the largest difference is shown. The run keeps the file.

    The network has seen all training images, also those of the validation split. So choices that are made on that
    split, such as the best epoch of a reduction, are not made on unseen images.

    Example: shoal adopt mynet:resnet20 --weights resnet20.pth --data cifar10 --data-dir DATA --normalise imagenet
    --out runs/adopted

    Example: shoal adopt net.onnx --data images --normalise none --out runs/adopted
    """
    body = job.adopt(request)
    show(body, json, lambda: pairs(f"{request.model} on {request.data}", body))
