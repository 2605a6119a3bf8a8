"""Labels with units for the keys of the JSON output, and how their values are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal import units

Show = Callable[[Any], str]


def _microseconds(value: float) -> str:
    return units.significant(1e6 * value)


def _nanoseconds(value: float) -> str:
    return units.significant(1e9 * value)


COUNTS: dict[str, tuple[str, Show]] = {
    "relus": ("ReLUs", units.count),
    "comparisons": ("comparisons of max pools and ReLU6", units.count),
    "quadratics": ("squared values", units.count),
    "macs": ("MACs of convolutions", units.count),
    "linear_macs": ("MACs of linear layers", units.count),
    "depth": ("convolutions on the longest path", units.count),
    "params": ("parameters", units.count),
    "relu_layers": ("layers with ReLUs", units.count),
}
"""Counts of one network."""

RESULTS: dict[str, tuple[str, Show]] = {
    "accuracy": ("test accuracy, %", units.percent),
    "claimed": ("accuracy that the file states, %", lambda value: "none" if value is None else units.percent(value)),
    "onnx_difference": ("largest difference of a logit from onnxruntime", units.probability),
    "test_images": ("test images", units.count),
    "adapted": ("adapted", str),
    "validation": ("best validation accuracy, %", units.percent),
    "best_epoch": ("best epoch, counted from 0", units.count),
    "largest_on_test": ("largest test accuracy of all epochs (selected on the test set), %", units.percent),
    "largest_on_test_epoch": ("its epoch, counted from 0", units.count),
    "last_on_test": ("test accuracy after the last epoch, %", units.percent),
    "out": ("folder", str),
    "fixed_accuracy": ("test accuracy in fixed point, %", units.percent),
    "images": ("images compared", units.count),
    "argmax_equal": ("images with the same predicted class", units.count),
    "max_abs_logit_error": ("largest logit error", units.probability),
    "error_bound": ("bound of the logit error", units.probability),
    "stages": ("stages", units.count),
}
"""Results of training, evaluation and export."""

DEPLOYMENT: dict[str, tuple[str, Show]] = {
    "client": ("client's half", str),
    "server": ("server's half", str),
    "digest": ("digest", str),
    "fraction_bits": ("fraction bits", units.count),
    "failure_bound": ("bound of the chance of a failed truncation", units.probability),
    "exact_truncations": ("layers truncated exactly", units.count),
    "seal_steps": ("layers multiplied by SEAL", units.count),
    "least_margin_bits": ("least margin of flooding over noise, bits", str),
    "ca": ("certificate authority", str),
    "names": ("names", str),
    "folder": ("folder", str),
    "product_seconds": ("products of linear layers, s", units.seconds),
    "product_bytes": ("products of linear layers, MB", units.megabytes),
    "and_seconds": ("ANDs of bits, s", units.seconds),
    "and_bytes": ("ANDs of bits, MB", units.megabytes),
    "chosen_seconds": ("products of bits and words, s", units.seconds),
    "chosen_bytes": ("products of bits and words, MB", units.megabytes),
    "made": ("items made", units.count),
    "ready": ("items ready", units.count),
    "bytes": ("items on this disk, MB", units.megabytes),
}
"""Figures of artifacts, certificates and prepared items."""

MACHINE: dict[str, tuple[str, Show]] = {
    "seal_transform_s": ("offline, SEAL: a polynomial of weights, ms", units.milliseconds),
    "seal_product_s": ("offline, SEAL: a product of ciphertext and weights, ms", units.milliseconds),
    "seal_input_s": ("offline, SEAL: a ciphertext of the client, ms", units.milliseconds),
    "seal_answer_s": ("offline, SEAL: an answer, ms", units.milliseconds),
    "seal_start_s": ("offline, SEAL: keys of a batch, ms", units.milliseconds),
    "product_s": ("offline, SPU: a product of ciphertexts, ms", units.milliseconds),
    "automorphism_s": ("offline, SPU: an automorphism, ms", units.milliseconds),
    "and_s": ("offline: an AND of one word, \u00b5s", _microseconds),
    "chosen_s": ("offline: a bit times a word, \u00b5s", _microseconds),
    "run_s": ("offline: a call of SPU, ms", units.milliseconds),
    "exchange_s": ("online: an exchange without a network, ms", units.milliseconds),
    "mac_s": ("online: a float64 MAC, ns", _nanoseconds),
    "weight_s": ("online: a weight that is read, ns", _nanoseconds),
    "relu_s": ("online: a ReLU, \u00b5s", _microseconds),
    "value_s": ("online: a value through a linear layer, \u00b5s", _microseconds),
    "query_s": ("online: an inference, ms", units.milliseconds),
    "spread": ("largest spread of a measurement, % of its median", lambda value: units.significant(100 * value)),
    "load": ("load average of the last minute, processes", units.significant),
    "file": ("file", str),
}
"""Constants of a machine."""

LABELS = COUNTS | RESULTS | DEPLOYMENT | MACHINE


def labelled(key: str, value: Any) -> tuple[str, str]:
    """The label of `key` with its unit, and `value` as text. An unknown key is shown with spaces for underscores."""
    label, show = LABELS.get(key, (key.replace("_", " "), _any))
    return label, "none" if value is None else show(value)


def _any(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return units.count(value) if isinstance(value, int) else units.significant(value, 4)
