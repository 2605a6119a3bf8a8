"""Networks as people write them, by what is particular in them; each returns five logits for images of `SHAPE`."""

from __future__ import annotations

import math
import types
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import randomise
from tests.surgery.public import Samepadded, Standardised

SHAPE = (4, 6, 8)
CLASSES = 5


class Net(nn.Module):
    """A convolution, batch norm and ReLU; `middle` of their result [N, 4, 6, 8]; `flat` of that; a linear layer."""

    def __init__(
        self, middle: Callable[[Any, Tensor], Any] = lambda m, x: x, flat: Callable[[Any, Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.middle, self.flat, self.fc = middle, flat or (lambda m, x: x.mean((2, 3))), nn.LazyLinear(CLASSES)
        self.second, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4)
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.scale, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.hidden, self.held = [nn.Conv2d(4, 4, 1)], None

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.bn(self.conv(x)))
        return self.fc(self.flat(self, self.middle(self, x)))


def net(middle: Any = lambda m, x: x, flat: Any = None, kind: type[Net] = Net) -> nn.Module:
    """A `Net` with statistics and the weights that lazy layers get in a first call, in eval mode."""
    model = kind(middle, flat).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            model(torch.randn(2, *SHAPE))
    return randomise(model)


class WithFeatures(Net):
    """Extra arguments with defaults, as networks for distillation have."""

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False, *more: Any, **options: Any) -> Any:
        features = self.conv(x)
        x = self.bn(features)
        if not preact:
            x = self.act(x)
        logits = self.fc(self.flat(self, self.middle(self, x)))
        return ([features], logits) if is_feat else logits


class Any1(Net):
    """The images among any number of arguments."""

    def forward(self, *args: Any) -> Any:
        return super().forward(args[0])


class OwnConv(nn.Conv2d):
    """A class that only sets options."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)


def by_size(m: Any, x: Tensor) -> Tensor:
    if x.size(2) > 4 and x.shape[-1] != 9 and x.dim() == 4:
        x = x * 2
    assert x.size(1) == 4, f"found {x.size(1)} channels"
    return F.avg_pool2d(x, 2) if x.shape[2:] == (6, 8) else x


def by_arithmetic(m: Any, x: Tensor) -> Tensor:
    half = int(x.size(1) * 0.5)
    rows = math.ceil(x.size(2) / 4) + round(0.6) - min(x.size(3), 1)
    return torch.cat([x[:, half:], x[:, :half]], 1)[:, :, rows:, : x.shape[3] // 2]


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    parts = [x[:, i : i + 1] * (i + 1) for i in range(x.size(1))]
    return torch.cat(parts[::-1], dim=1)


def logged(m: Any, x: Tensor) -> Tensor:
    m.held = x.mean().item()
    print("the size is", x.shape, f"{x.size(1)}")
    return x


FORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": net,
    "ReLU made in forward": lambda: net(lambda m, x: nn.ReLU()(x - 0.3)),
    "layers made in forward": lambda: net(lambda m, x: nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))(x)),
    "bn.forward": lambda: net(lambda m, x: m.bn.forward(x)),
    "conv.forward": lambda: net(lambda m, x: m.second.forward(x)),
    "decisions by size": lambda: net(by_size),
    "arithmetic on sizes": lambda: net(by_arithmetic),
    "range of a size": lambda: net(in_a_loop),
    "shape // 1": lambda: net(flat=lambda m, x: x.view(x.shape[0] // 1, -1)),
    "len of a shape": lambda: net(lambda m, x: x * 2 if len(x.shape) == 4 else x),
    "isinstance": lambda: net(lambda m, x: x * 2 if isinstance(x, torch.Tensor) else x),
    "arguments with defaults": lambda: net(kind=WithFeatures),
    "any arguments": lambda: net(kind=Any1),
    "mean in turn, kept": lambda: net(flat=lambda m, x: x.mean(3, keepdim=True).mean(2, keepdim=True).flatten(1)),
    "mean in turn, kept, from behind": lambda: net(flat=lambda m, x: x.mean(-2, True).mean([-1], True).flatten(1)),
    "view and mean": lambda: net(flat=lambda m, x: x.view(x.size(0), x.size(1), -1).mean(2)),
    "view by numbers and mean": lambda: net(flat=lambda m, x: x.reshape(-1, 4, 6 * 8).mean(-1)),
    "flatten and mean": lambda: net(flat=lambda m, x: x.flatten(2).mean(-1)),
    "torch.flatten and mean": lambda: net(flat=lambda m, x: torch.flatten(x, start_dim=2).mean(dim=2)),
    "axis": lambda: net(lambda m, x: torch.cat([x, x], axis=1), lambda m, x: x.mean(axis=(2, 3), keepdims=False)),
    "nn.Flatten(1, 3)": lambda: net(flat=lambda m, x: nn.Flatten(1, 3)(x)),
    "torch.flatten(1, 3)": lambda: net(flat=lambda m, x: torch.flatten(x, 1, 3)),
    "float": lambda: net(lambda m, x: x.float().to(torch.float32).type_as(x)),
    "clone": lambda: net(lambda m, x: torch.clone(x).detach()),
    "ConstantPad2d": lambda: net(lambda m, x: nn.ConstantPad2d((1, 2, 0, 1), 0.0)(x)),
    "ZeroPad2d": lambda: net(lambda m, x: nn.ZeroPad2d(1)(x)),
    "channels by a list": lambda: net(lambda m, x: x[:, [2, 1, 0]]),
    "channels by a list, from behind": lambda: net(lambda m, x: x[:, [-1, 0, 0], 1:]),
    "channels by a buffer": lambda: net(lambda m, x: x[:, m.order]),
    "channels by a mask": lambda: net(lambda m, x: x[:, torch.tensor([True, False, True, True])]),
    "index_select": lambda: net(lambda m, x: x.index_select(1, m.order)),
    "torch.index_select": lambda: net(lambda m, x: torch.index_select(x, dim=-1, index=m.order)),
    "ellipsis": lambda: net(lambda m, x: x[..., ::2, ::2] + x[..., 1::2, 1::2]),
    "flat scale and shift": lambda: net(flat=lambda m, x: x.mean((2, 3)) * m.scale + m.shift),
    "flat batch norm": lambda: net(flat=lambda m, x: m.bn1(x.mean((2, 3)))),
    "a number of NumPy": lambda: net(lambda m, x: x * np.float32(0.5)),
    "values logged": lambda: net(logged),
    "option A shortcut": lambda: net(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)),
    "a class that sets options": lambda: layered(OwnConv(4)),
    "a padding mode without padding": lambda: layered(nn.Conv2d(4, 4, 3, padding_mode="reflect")),
    "weight_norm": lambda: layered(nn.utils.weight_norm(nn.Conv2d(4, 4, 3))),
    "parametrized weight_norm": lambda: layered(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
    "spectral_norm": lambda: layered(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))),
    "parametrized spectral_norm": lambda: layered(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))),
    "pruned": lambda: layered(pruned()),
    "pruned twice": lambda: layered(nn.utils.prune.random_unstructured(pruned(), "weight", 0.5)),
    "lazy layers after a call": lambda: layered(nn.LazyConv2d(4, 3)),
    "DataParallel": lambda: nn.DataParallel(net()),
    "DataParallel inside": lambda: layered(nn.DataParallel(nn.Conv2d(4, 4, 3))),
    "torch.compile": lambda: torch.compile(net()),  # type: ignore[dict-item, return-value]
    "torch.compile inside": lambda: layered(torch.compile(nn.Conv2d(4, 4, 3))),
    "compiled in place": lambda: in_place(net()),
    "double": lambda: net().double(),
    "half": lambda: net().half(),
    "a keyword as a name": lambda: named("class"),
    "a keyword as a key": lambda: layered(Keyed()),
    "batch norm given statistics": lambda: layered(given()),
    "names of functions": lambda: Methods().eval(),
    "a hook that records": lambda: recorded(),
    "forward replaced on the network": lambda: replaced(),
    "sizes as several arguments": lambda: net(flat=lambda m, x: x.view(*x.shape[:2], -1).mean(2)),
    "np.prod of sizes": lambda: net(flat=lambda m, x: x.view(-1, int(np.prod(x.size()[1:])))),
    "numel": lambda: net(flat=lambda m, x: x.view(x.size(0), x.numel() // x.size(0))),
    "torch.is_tensor": lambda: net(lambda m, x: x if torch.is_tensor(x) else torch.cat(x, 1)),
    "the device of the values": lambda: net(lambda m, x: x.to(x.device).to(m.scale.device, m.scale.dtype)),
    "means to the device": lambda: net(
        lambda m, x: (x - m.shift.reshape(4, 1, 1).to(x.device)) / m.scale[:, None, None]
    ),
    "a parameter that is computed": lambda: net(
        lambda m, x: torch.sigmoid(m.shift).view(1, -1, 1, 1) * x + m.scale.sum()
    ),
    "over a parameter": lambda: net(lambda m, x: x / m.scale.view(4, 1, 1) - m.shift.view(4, 1, 1)),
    "a tensor made for the device": lambda: net(
        lambda m, x: x - torch.tensor([0.1, 0.2, 0.3, 0.4], device=x.device)[:, None, None]
    ),
    "a tensor made from the values": lambda: net(lambda m, x: x - x.new_tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)),
    "F.conv2d": lambda: net(lambda m, x: F.conv2d(x, m.second.weight, m.second.bias, padding=1)),
    "F.linear": lambda: net(flat=lambda m, x: F.linear(x.mean((2, 3)), m.second.weight[:, :, 0, 0] * 2, m.second.bias)),
    "products with weights": lambda: net(
        flat=lambda m, x: x.mean((2, 3)) @ m.second.weight.flatten(1).t() + m.second.bias
    ),
    "addmm": lambda: net(flat=lambda m, x: torch.addmm(m.shift, x.mean((2, 3)), m.second.weight.flatten(1))),
    "standardised weights": lambda: layered(Standardised(4, 4, 3)),
    "forward replaced on a layer": lambda: functional(),
    "method replaced on a layer": lambda: functional("_conv_forward"),
    "padding of TensorFlow": lambda: layered(Samepadded(4, 4, 3, 2)),
    "mirrored borders": lambda: net(lambda m, x: F.pad(x, (1, 2, 1, 0), mode="reflect")),
    "repeated borders": lambda: net(lambda m, x: nn.ReplicationPad2d((1, 0, 2, 0))(x)),
    "circular borders": lambda: layered(nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular")),
    "mirrored borders, same": lambda: layered(nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect")),
    "negative padding": lambda: net(lambda m, x: nn.ZeroPad2d(-1)(F.pad(x, (0, -1)))),
    "nearest neighbours": lambda: net(lambda m, x: x + F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:])),
    "nn.Upsample": lambda: layered(nn.Upsample(scale_factor=2)),
    "flip and roll": lambda: net(lambda m, x: x.flip(3) + torch.roll(x, (1, 2), (2, 3))),
    "repeat": lambda: net(lambda m, x: x[:, :1].repeat(1, 4, 1, 1) + x[:, 1:2].expand(-1, 4, -1, -1)),
    "narrow": lambda: net(lambda m, x: torch.cat([x.narrow(1, 2, 2), torch.narrow(x, 1, 0, 2)], 1)),
    "one channel": lambda: net(
        lambda m, x: torch.cat([torch.unsqueeze(x[:, i], 1) * (i + 0.5) for i in range(-2, 2)], 1)
    ),
    "the same shape": lambda: net(lambda m, x: nn.Unflatten(1, (4, 6, 8))(x.flatten(1)).view(-1, 4, 6, 8)),
    "squeeze": lambda: net(flat=lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze()),
    "squeeze in place": lambda: net(flat=lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze_(-1).squeeze_(-1)),
    "sum over positions": lambda: net(flat=lambda m, x: x.sum(dim=[2, 3]) / (x.size(2) * x.size(3))),
    "sum over positions, kept": lambda: net(flat=lambda m, x: torch.sum(x, (-2, -1), keepdim=True).flatten(1)),
    "amax": lambda: net(flat=lambda m, x: x.amax((2, 3)) + torch.amax(x, dim=(2, 3), keepdim=True).flatten(1)),
    "stack and mean": lambda: net(lambda m, x: torch.stack([x, m.second(x), x * 2]).mean(0)),
    "stack and sum": lambda: net(lambda m, x: torch.stack([x, m.second(x)], dim=1).sum(dim=1)),
    "zeros like": lambda: net(lambda m, x: torch.cat([x[:, 2:], torch.zeros_like(x[:, 2:])], 1)),
    "threshold": lambda: net(lambda m, x: nn.Threshold(0.0, 0.0)(F.threshold(m.second(x), 0, 0) - 0.3)),
    "dropout of any kind": lambda: layered(nn.Sequential(nn.Dropout3d(), Dropped())),
    "instance norm with statistics": lambda: layered(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "a hook in place": lambda: hooked_in_place(),
}
"""Networks that can be used: what is particular in them -> the network."""


def layered(layer: Any) -> nn.Module:
    """A network with `layer` after its first ReLU."""

    class Layered(Net):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.layer: Any = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.layer(self.act(self.bn(self.conv(x)))).mean((2, 3)))

    found = net(kind=Layered)
    found.layer = layer
    with torch.no_grad():
        found.train()(torch.randn(8, *SHAPE))
    return found.eval()


def pruned() -> nn.Module:
    return nn.utils.prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)


def in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


class Keyed(nn.Module):
    """Submodules and a parameter with names that are Python keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"class": nn.Conv2d(4, 4, 3), "if": nn.ReLU()})
        self.register_parameter("def", nn.Parameter(torch.randn(4, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["if"](self.parts["class"](x) * getattr(self, "def"))


class Methods(nn.Module):
    """Submodules and buffers that are named as functions and methods of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.flatten, self.reshape = nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)
        self.chunk, self.split, self.mean = nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.size, self.contiguous, self.numel = nn.Flatten(), nn.Linear(4, CLASSES), nn.Identity()
        self.register_buffer("detach", torch.rand(1, 4, 1, 1))
        self.register_buffer("permute", torch.rand(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.reshape(self.flatten(self.squeeze((x - self.detach) / self.permute)))
        return self.contiguous(self.numel(self.size(self.mean(self.split(self.chunk(x))))))


def named(name: str) -> nn.Module:
    model = net()
    layer = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model.add_module(name, layer)
    model.middle = lambda m, x: getattr(m, name)(x)
    return model


def given() -> nn.Module:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    norm.running_mean, norm.running_var = torch.rand(4), torch.rand(4) + 0.5
    return norm


def recorded() -> nn.Module:
    model, found = net(), {}

    def record(module: nn.Module, args: Any, result: Tensor) -> None:
        found["features"] = result.detach()

    model.conv.register_forward_hook(record)
    model.register_forward_pre_hook(lambda module, args: None)
    return model


def replaced() -> nn.Module:
    model = net()
    model.forward = types.MethodType(lambda self, x: self.fc(self.act(self.conv(x)).mean((2, 3))), model)
    return model


LINE = r" at \S*refused\.py:\d+ \(.*\), which torch.fx cannot trace; need "
"""The place in a message on a line of this file."""
BY_VALUES = " by the values of a tensor" + LINE + "code that is the same for all images; .* sizes or flags"


class Named(Net):
    """Logits of two classifiers in a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)
        self.kind = namedtuple("Results", "aux logits")
        randomise(self.eval())

    def forward(self, x: Tensor) -> Any:
        features = self.act(self.bn(self.conv(x))).mean((2, 3))
        return self.kind(self.aux(features), self.fc(features))


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(F.dropout3d(x, 0.2, self.training), 0.1, self.training)


def functional(method: str = "forward") -> nn.Module:
    """A method of a convolution is replaced on the instance; `forward` calls `_conv_forward`."""
    model = net(lambda m, x: m.second(x))
    computed = types.MethodType(lambda self, x, *_: F.conv2d(x, self.weight * 2, padding=1), model.second)
    setattr(model.second, method, computed)
    return model


def hooked_in_place() -> nn.Module:
    model = net()

    def double(module: nn.Module, args: Any, result: Tensor) -> None:
        result.mul_(2)

    model.conv.register_forward_hook(double)
    return model
