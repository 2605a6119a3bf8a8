"""Networks that are refused, with what the refusal says, and networks that cannot run in private."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.surgery.networks import BY_VALUES, CLASSES, LINE, Net, layered, net


def loop(m: Any, x: Tensor) -> Any:
    total: Any = 0
    for image in x:
        total = total + image
    return total


def shrunk(m: Any, x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = x / 2
    return x


def printed(m: Any, x: Tensor) -> Tensor:
    print(x)
    return x


def assigned(m: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def folded(x: Tensor) -> Tensor:
    return x if bool(x.sum() > 0) else -x


def with_scripted_function() -> nn.Module:
    function = torch.jit.script(folded)
    return unmade(lambda m, x: function(x))


RAISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "if by values": (lambda: unmade(lambda m, x: x if x.sum() > 0 else -x), "found a decision .*" + BY_VALUES),
    "while by values": (lambda: unmade(shrunk), "found a decision .*" + BY_VALUES),
    "if by a parameter": (lambda: unmade(lambda m, x: x if m.scale[0] > 0 else -x), "found a decision .*" + BY_VALUES),
    "if by the images": (
        lambda: unmade(lambda m, x: x if x.size(0) > 1 else -x),
        "found a decision .* by the number of images" + LINE + "code that is the same for any number of images",
    ),
    "loop": (lambda: unmade(loop), "found a loop over a tensor .*" + LINE + "a fixed number of steps"),
    "star": (lambda: unmade(lambda m, x: torch.cat([*x])), "found a loop over a tensor .*" + LINE),
    "list": (lambda: unmade(lambda m, x: sum(list(x))), "found a loop over a tensor .*" + LINE),
    "range of images": (
        lambda: unmade(lambda m, x: sum([x for _ in range(len(x))])),
        "found .*number of images" + LINE,
    ),
    "item": (lambda: unmade(lambda m, x: x * x.mean().item()), r"found \.item\(\)" + LINE + "values that stay tensors"),
    "tolist": (lambda: unmade(lambda m, x: torch.tensor(x.tolist())), "found .*" + LINE),
    "numpy": (lambda: unmade(lambda m, x: torch.from_numpy(x.detach().numpy())), r"found \.numpy\(\)" + LINE),
    "float": (lambda: unmade(lambda m, x: x * float(x.mean())), r"found a conversion with float\(\)" + BY_VALUES),
    "math": (lambda: unmade(lambda m, x: x * math.exp(x.mean())), r"found a conversion with float\(\)" + BY_VALUES),
    "in": (lambda: unmade(lambda m, x: x if 3 in x else -x), "found a test with `in`" + BY_VALUES),
    "NumPy": (lambda: unmade(lambda m, x: np.sqrt(x)), "found a call of NumPy" + LINE + "operations of torch"),
    "print": (
        lambda: unmade(printed),
        "found values of a tensor that become text .print.*" + LINE + ".*remove that line",
    ),
    "f-string": (lambda: unmade(lambda m, x: {f"{x.mean():.1f}": x}["1"]), "found values of a tensor that become text"),
    "zeros": (
        lambda: unmade(lambda m, x: x + torch.zeros(x.size())),
        r"found a call of torch.zeros\(\) with sizes .* at \S*refused\.py:\d+ .*; need constants .* in __init__",
    ),
    "zeros of numbers": (
        lambda: unmade(lambda m, x: torch.cat([x[:, 2:], torch.zeros(x.size(0), 2, 6, 8)], 1)),
        r"found a call of zeros\(\) with sizes" + ".*" + LINE + "constants",
    ),
    "assignment": (lambda: unmade(assigned), r"found an assignment to a part of a tensor .*" + LINE + ".*torch.cat"),
    "scripted function": (with_scripted_function, "found a call .*" + LINE + "operations"),
    "layer in a list": (lambda: unmade(lambda m, x: m.hidden[0](x)), "found a call of nn.Conv2d .*ModuleList"),
    "layer made in forward": (
        lambda: unmade(lambda m, x: nn.Conv2d(4, 4, 1)(x)),
        "found a call of nn.Conv2d .*__init__",
    ),
    "dropout made in forward": (lambda: unmade(lambda m, x: nn.Dropout()(x)), "found nn.Dropout made inside forward"),
    "dropout in inference": (
        lambda: unmade(lambda m, x: F.dropout(x)),
        "gives two results for the same images.*training",
    ),
    "two inputs": (
        lambda: TwoInputs(),
        "found a forward that needs the arguments x, y at TwoInputs.*; need one argument",
    ),
    "input by name": (lambda: NamedInput(), "found a forward that needs the arguments x, y at NamedInput"),
    "its own error": (lambda: unmade(lambda m, x: m.missing(x)), r"fails on images of shape \(4, 6, 8\): .*'missing'"),
    "features too": (
        lambda: net(kind=LogitsAndFeatures),
        r"found that forward returns results of shapes \(5,\), \(4, 6, 8\) at LogitsAndFeatures; .*only the logits",
    ),
    "features of as many columns": (
        lambda: AsManyFeatures(),
        r"found that output 0 is computed from the last layer of output 1 at AsManyFeatures; need one output, or "
        r"classifiers .* of their own; choose the one .* by --output .*, out of 0 \(fc\), 1 \(normalize\); or return",
    ),
    "logits and their softmax": (
        lambda: doubled(lambda m, logits: (logits, logits.softmax(1))),
        r"found that output 1 is computed from the last layer of output 0 .* out of 0 \(fc\), 1 \(softmax\)",
    ),
    "logits twice": (
        lambda: doubled(lambda m, logits: (logits, logits)),
        "found that output 1 is computed from the last layer of output 0",
    ),
    "a classifier that reads another": (
        lambda: doubled(lambda m, logits: (logits, m.second(F.relu(logits)))),
        r"found that output 1 is computed from the last layer of output 0 .* out of 0 \(fc\), 1 \(second\)",
    ),
    "logits and a list": (
        lambda: doubled(lambda m, logits: (logits, [logits])),
        "found that forward returns a list at Doubled; need logits, .*choose one of a tuple by --output",
    ),
    "dict": (lambda: LogitsByName(), "found that forward returns a dict at LogitsByName; .*return only those tensors"),
    "hook": (
        lambda: hooked("forward", lambda module, args, result: result * 2),
        r"found a forward hook on conv that changes values \(hooked.*|found a forward hook on conv .*lambda",
    ),
    "hook of a block": (
        lambda: hooked("forward", double_result, "block"),
        "found a forward hook on block .*double_result",
    ),
    "hook of the network": (
        lambda: hooked("forward", double_result, ""),
        "found a forward hook on Hooked .*double_result",
    ),
    "pre-hook": (lambda: hooked("pre", halve_images), "found a forward pre-hook on conv that .*halve_images.*; write"),
    "padding pre-hook": (lambda: hooked("pre", pad_images), "found a forward pre-hook on conv that .*pad_images"),
    "hook that needs values": (lambda: hooked("forward", note), "found a forward hook on conv that cannot be traced"),
    "forward of another layer": (
        lambda: borrowed(),
        r"found forward of conv replaced by borrowed\S*, a function that holds layers .*; need layers .*; write a ",
    ),
    "forward wrapped": (
        lambda: wrapped("forward"),
        "found forward of conv replaced by wrapped.*, a function that holds",
    ),
    "method wrapped": (
        lambda: wrapped("_conv_forward"),
        "found _conv_forward of conv replaced by wrapped.*, a function that holds",
    ),
    "call wrapped": (
        lambda: wrapped("_call_impl"),
        "found _call_impl of conv replaced by wrapped.*, which tracing leaves out; need layers .*; write a class",
    ),
    "vmap": (
        lambda: unmade(lambda m, x: torch.vmap(lambda image: image * 2)(x)),
        "found a call of torch.vmap" + LINE + r"operations on the whole batch .*; write that function for all images",
    ),
    "torch.func": (
        lambda: unmade(lambda m, x: torch.func.vjp(lambda image: image * 2, x)[0]),
        "found a call of a function of torch.func" + LINE + "operations on the whole batch",
    ),
    "scripted block": (
        lambda: layered(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))),
        "found a scripted module .torch.jit. at layer; need the Python module",
    ),
    "scripted network": (
        lambda: torch.jit.script(nn.Conv2d(4, 4, 1)),
        "found a scripted module .torch.jit. at Recursive",
    ),
    "scripted in forward": (lambda: unmade(lambda m, x: torch.jit.script(nn.ReLU())(x)), "found a scripted module"),
    "lazy layers": (lambda: Net(), "found a lazy layer without weights at fc; .*call the network once"),
    "no copy": (lambda: uncopied(), "found that Net cannot be copied .*; need a module that copy.deepcopy copies"),
}
"""Networks that no command accepts -> what the message says."""

PRIVATE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "negative padding": (lambda: net(lambda m, x: nn.ZeroPad2d((-1, 1, 0, 0))(x)), "pad with a negative amount"),
    "padding with ones": (lambda: net(lambda m, x: nn.ConstantPad2d(1, 1.0)(x)), "pad with 1.0 instead of zeros"),
    "mean of channels": (lambda: net(lambda m, x: x - x.mean(1, keepdim=True)), "mean over 1 alone"),
    "mean of everything": (lambda: net(lambda m, x: x - x.mean()), "mean of everything"),
    "batch statistics": (
        lambda: layered(nn.BatchNorm2d(4, track_running_stats=False)),
        "BatchNorm2d without running statistics",
    ),
    "alpha": (lambda: net(lambda m, x: torch.add(x, m.second(x), alpha=2)), "options of add"),
    "larger of two": (lambda: net(lambda m, x: torch.max(*torch.cat([x, x + 1], 1).split(4, 1))), "max"),
    "absolute": (lambda: net(lambda m, x: x.abs()), "abs"),
    "square": (lambda: net(lambda m, x: x**2), "pow"),
    "comparison": (lambda: net(lambda m, x: x * (x > 0.5)), "gt"),
    "zeros by sizes": (lambda: net(lambda m, x: x + x.new_zeros(x.size(0), 4, 6, 8)), "new_zeros"),
    "bilinear": (lambda: net(lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear")), "interpolate"),
    "channels last": (lambda: net(lambda m, x: x, lambda m, x: x.permute(0, 2, 3, 1).mean((1, 2))), "permute"),
    "unit length": (lambda: net(flat=lambda m, x: F.normalize(x.mean((2, 3)))), "normalize"),
    "einsum of two": (lambda: net(lambda m, x: torch.einsum("nchw,nchw->nchw", x, x)), "einsum"),
    "layer norm": (lambda: layered(nn.LayerNorm([4, 6, 8])), "LayerNorm"),
    "unknown function": (lambda: net(lambda m, x: torch.cumsum(x, 1)), "cumsum"),
    "cast": (lambda: net(lambda m, x: x.double().float()), "double torch.float64"),
    "rows by a list": (lambda: net(lambda m, x: x[:, :, [0, 1], [1, 0]], lambda m, x: x.flatten(1)), "indexing"),
    "split rows": (lambda: net(lambda m, x: x.chunk(2, 2)[0]), "chunk along a dimension other"),
    "concatenated rows": (lambda: net(lambda m, x: torch.cat([x, x], 2)), "cat along dimension 2"),
    "clamped": (lambda: net(lambda m, x: x.clamp(0, 1)), "clamp to"),
    "gate": (lambda: net(lambda m, x: x * x.mean((2, 3), keepdim=True)), "mul of values"),
    "group norm": (lambda: layered(nn.GroupNorm(2, 4)), "GroupNorm"),
    "activation": (lambda: layered(nn.SiLU()), "SiLU"),
    "largest with places": (
        lambda: net(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0]),
        "max_pool2d_with_indices",
    ),
    "flat norm that nothing takes": (
        lambda: net(flat=lambda m, x: F.relu(m.bn1(F.relu(x.mean((2, 3)))))),
        "batch_norm",
    ),
}
"""Networks that can be trained but not run in private -> what is refused."""


class Unmade(nn.Module):
    """A forward pass that is `middle` of a convolution, without a first call."""

    def __init__(self, middle: Callable[[Any, Tensor], Any], flat: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.scale, self.middle, self.flat = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4)), middle, flat
        self.fc, self.hidden = nn.Linear(4, CLASSES), [nn.Conv2d(4, 4, 1)]

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.flat(self, self.middle(self, self.conv(x).abs() + 1).mean((2, 3))))


def unmade(middle: Callable[[Any, Tensor], Any], flat: Any = lambda m, x: x) -> nn.Module:
    return Unmade(middle, flat)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class NamedInput(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return x + y


class LogitsAndFeatures(Net):
    def forward(self, x: Tensor) -> Any:
        features = self.conv(x)
        return self.fc(self.act(features).mean((2, 3))), features


class AsManyFeatures(nn.Module):
    """Logits, and as many features as there are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, CLASSES, 1), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).mean((2, 3))
        return self.fc(F.relu(features)), F.normalize(features)


class Doubled(Net):
    """Results that are a function of the logits of one classifier."""

    def __init__(self, results: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.second, self.results = nn.Linear(4, CLASSES), nn.Linear(CLASSES, CLASSES), results

    def forward(self, x: Tensor) -> Any:
        return self.results(self, super().forward(x))


def doubled(results: Callable[[Any, Tensor], Any]) -> nn.Module:
    return Doubled(results)


class LogitsByName(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU()), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.conv(x)).mean((2, 3)))


def hooked(kind: str, hook: Callable[..., Any], name: str = "conv") -> nn.Module:
    model = Hooked()
    layer = model.get_submodule(name)
    (layer.register_forward_hook if kind == "forward" else layer.register_forward_pre_hook)(hook)
    return model


def double_result(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


def halve_images(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] / 2


def pad_images(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return F.pad(args[0], (1, 1, 1, 1), mode="circular")


def note(module: nn.Module, args: Any, result: Tensor) -> None:
    float(result.mean())


def borrowed() -> nn.Module:
    """The convolution computes with another's weights, twice."""
    model, other = Hooked(), nn.Conv2d(4, 4, 1)
    old = other.forward
    model.conv.forward = lambda x: old(x) * 2
    return model


def wrapped(method: str) -> nn.Module:
    """A method of the convolution is replaced by a closure around it."""
    model = Hooked()
    old = getattr(model.conv, method)
    setattr(model.conv, method, lambda *given: old(*given) * 2)
    return model


def uncopied() -> nn.Module:
    model = net()
    model.held = (i for i in range(3))
    return model
