"""One training step and four ways to run it: eager, compiled, recorded as a CUDA graph, or both.

Whatever the way, it is the same work on the same tensors, and nothing in it waits for the device. A recorded step runs
its Python once, so what changes from step to step lies in tensors that are changed in place: rates, weights of terms,
masks, gates. Where something else changes, hooks say so and it is recorded anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError, ShoalWarning, first_line
from shoal.outputs import Outputs, Tapped, unwrap
from shoal.training.settings import Settings

ObjectiveLike = Callable[[Outputs, Outputs | None, Tensor], tuple[Tensor, dict[str, Tensor]]]

WARM = 3
"""Steps before the first recording: libraries make their buffers, the optimiser its state."""


class Work:
    """Teacher, student, objective, backward pass and update on one batch; `sums` add up its losses by name."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        objective: ObjectiveLike,
        hooks: Sequence[Any],
        optimiser: torch.optim.Optimizer,
        settings: Settings,
    ) -> None:
        every = (objective, *hooks)
        taps = tuple(dict.fromkeys(tap for part in every for tap in getattr(part, "taps", ())))
        own = tuple(dict.fromkeys((*taps, *getattr(objective, "own", ()))))
        self.student = Tapped(model, own)
        self.teacher = Tapped(teacher, taps) if teacher is not None else None
        self.objective, self.optimiser, self.settings = objective, optimiser, settings
        self.listeners = [hook for hook in every if hasattr(hook, "on_batch")]
        self.judge = self._judge
        self.sums: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Learn from images [N, C, H, W] with labels [N]."""
        loss, parts, student, taught = self.judge(x, y)
        for hook in self.listeners:
            hook.on_batch(student, taught)
        del student, taught  # taps that no gradient needs would lie in memory through the backward pass
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self._count({"loss": loss.detach(), **parts})

    def _judge(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor], Outputs | None, Outputs | None]:
        taught = None
        with self.settings.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(x)
            student = self.student(x)
        loss, parts = self.objective(student, taught, y)
        # A compiled step that gives no activations away need not keep them.
        return (loss, parts, student, taught) if self.listeners else (loss, parts, None, None)

    def _count(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value)
        torch._foreach_add_([self.sums[name] for name in values], list(values.values()))

    def begin(self, sums: dict[str, float]) -> None:
        """Count from these sums on: none at an epoch's start."""
        for name, value in sums.items():
            self.sums.setdefault(name, torch.zeros((), device=self.settings.device))
            self.sums[name].fill_(value)
        for name in self.sums.keys() - sums.keys():
            self.sums[name].zero_()

    is_ready = True
    """Whether the next step is one like all others, neither compiled nor recorded first."""

    def close(self) -> None:
        """Leave the networks as they were."""
        del self.judge  # a method of this object's: networks would wait for Python's collector of cycles
        for network in (self.student, self.teacher):
            if network is not None:
                network.close()


class Compiled:
    """Work whose forward pass and objective `torch.compile` makes into few kernels, the backward pass with them."""

    def __init__(self, work: Work) -> None:
        self.work, self.plain, self.tried = work, work.judge, False
        # Of its own: the compiler counts by code, gives up at the ninth network of a process, and only logs that.
        known = signature(torch.compile).parameters  # PyTorch's later ones
        own: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
        work.judge = torch.compile(work.judge, dynamic=False, **own)

    @property
    def is_ready(self) -> bool:
        """Whether the next step is compiled already."""
        return self.tried

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """See `Work`; where compiling fails, a warning says so and all steps run eagerly."""
        if not self.tried:
            self._try(x, y)
        self.work(x, y)

    def _try(self, x: Tensor, y: Tensor) -> None:
        """Have both passes compiled, and leave no trace in the network or in random numbers."""
        self.tried = True
        model = self.work.student.model
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        wanted = [p for p in model.parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                torch.autograd.grad(self.work.judge(x, y)[0], wanted, allow_unused=True)
        except Exception as error:  # whatever a compiler raises; an error of the network's comes again without it
            self.work.judge = self.plain
            _warn(f"found that the step cannot be compiled ({_said(error)}); the step runs eagerly")
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


class Recorder(Protocol):
    """What records work on a device to do it again."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do the work, as a preparation of the recording."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work once; the result does it again on the same memory."""


class CudaGraphs:
    """Records as CUDA graphs; a step is then one launch and not hundreds."""

    def warm(self, work: Callable[[], None]) -> None:
        """See `Recorder`; on a stream of its own, as PyTorch asks of work that is to be recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            raise ShoalError(
                f"found that the step cannot be recorded as a CUDA graph ({_said(_first_cause(error))}); need "
                "work that never waits for the device; go on with --resume --step eager (Settings.step)"
            ) from error
        graph.replay()
        return graph.replay


class Recorded:
    """Work that is recorded after a few steps and then played back on the same memory."""

    def __init__(self, work: Callable[[Tensor, Tensor], None], recorder: Recorder) -> None:
        self.work, self.recorder, self.warm = work, recorder, 0
        self.batch: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """See `Work`; all batches must be of one shape."""
        if self.warm < WARM:
            self.warm += 1
            return self.recorder.warm(lambda: self.work(x, y))
        if self.replay is None or self.batch is None:
            self.batch = mine = x.clone(), y.clone()
            self.replay = self.recorder.record(lambda: self.work(*mine))
        else:
            torch._foreach_copy_(list(self.batch), [x, y])
            self.replay()

    @property
    def is_ready(self) -> bool:
        """Whether the next step is played back."""
        return self.replay is not None

    def forget(self) -> None:
        """Record anew, after another step as a preparation: it computes something else."""
        self.replay = self.batch = None
        self.warm = min(self.warm, WARM - 1)


Step = Work | Compiled | Recorded


def make_step(work: Work) -> Step:
    """`work` in the way that its settings ask for.

    Warns, as ShoalWarning, where the machine, a term or a hook rules a way out, which is then left.
    """
    asked, step = work.settings.step, cast("Step", work)
    parallel = isinstance(work.student.model, nn.parallel.DistributedDataParallel)
    computed = (*work.student.model.modules(), *getattr(work.objective, "terms", ()), work.objective)
    if asked.startswith("compiled"):
        reason = "several processes" if parallel else _unsuited(computed)
        step = step if _ruled_out("compiled", reason) else Compiled(work)
    if asked.endswith("graph"):
        recorder = recorder_for(work.settings.device)
        reason = "several processes" if parallel else _unsuited((*computed, *work.listeners))
        reason = reason if recorder else f"device {work.settings.device!r}"
        step = step if _ruled_out("recorded", reason) or recorder is None else Recorded(step, recorder)
    return step


def _ruled_out(what: str, reason: str | None) -> bool:
    if reason:
        _warn(
            f"found {reason}; need one process, the same work at every step, and for graphs a CUDA device; "
            f"the step is not {what}"
        )
    return reason is not None


def recorder_for(device: str) -> Recorder | None:
    """What records work on `device`, if anything does."""
    return CudaGraphs() if torch.device(device).type == "cuda" else None


def _unsuited(parts: Sequence[Any]) -> str | None:
    found = next((part for part in parts if not _recordable(part)), None)
    return None if found is None else f"{_name(found)}, which may compute something else at each step"


def _recordable(part: Any) -> bool:
    """What says nothing of itself is taken for recordable, unless it listens to batches."""
    return bool(getattr(part, "recordable", not hasattr(part, "on_batch")))


def is_steady(part: Any) -> bool:
    """Whether a record outlives the methods that an objective or a hook has for epochs."""
    return bool(getattr(part, "recordable", not any(name.startswith("on_epoch") for name in dir(part))))


def _name(part: Any) -> str:
    return getattr(part, "name", type(part).__name__)


def _first_cause(error: BaseException) -> BaseException:
    """What was raised first: ending a recording that has failed raises an error of its own."""
    return error if error.__context__ is None else _first_cause(error.__context__)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _warn(text: str) -> None:
    warnings.warn(text, ShoalWarning, stacklevel=2)


def explain_layout(error: RuntimeError, model: nn.Module) -> ShoalError:
    """What to do about a network that cannot take images in channels_last; other errors are raised again."""
    if "view size is not compatible" not in str(error):
        raise error
    return ShoalError(
        f"found a view of channels_last images at {type(unwrap(model)).__name__}; need a reshape, or a network "
        "that `assemble` has traced; write x.flatten(1), or pass Settings(channels_last=False)"
    )
