"""One training step and four ways to run it: eager, compiled, recorded as a CUDA graph, or both.

All ways do the same work on the same tensors, and nothing in a step waits for the device. The Python code of a recorded
step runs only once. Values that change from step to step are therefore tensors that are changed in place: rates,
weights of terms, masks, gates. If anything else changes, a hook reports it and the step is recorded again.
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
from shoal.training.memory_format import compiled_layout
from shoal.training.settings import Settings

ObjectiveLike = Callable[[Outputs, Outputs | None, Tensor], tuple[Tensor, dict[str, Tensor]]]

WARM = 3
"""Steps before the first recording, in which libraries allocate buffers and the optimiser its state."""


class Work:
    """Teacher, student, objective, backward pass and update on one batch. `sums` are the sums of the losses by name."""

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
        """Train on images [N, C, H, W] with labels [N]."""
        loss, parts, student, taught = self.judge(x, y)
        for hook in self.listeners:
            hook.on_batch(student, taught)
        del student, taught  # else taps that no gradient needs stay in memory during the backward pass
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
        # A compiled step that does not return activations need not store them.
        return (loss, parts, student, taught) if self.listeners else (loss, parts, None, None)

    def _count(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value)
        torch._foreach_add_([self.sums[name] for name in values], list(values.values()))

    def begin(self, sums: dict[str, float]) -> None:
        """Set the sums to `sums`, and all others to 0. An epoch starts with none."""
        for name, value in sums.items():
            self.sums.setdefault(name, torch.zeros((), device=self.settings.device))
            self.sums[name].fill_(value)
        for name in self.sums.keys() - sums.keys():
            self.sums[name].zero_()

    is_ready = True
    """Whether the next step is an ordinary one, without compiling or recording."""

    def close(self) -> None:
        """Remove the hooks from the networks."""
        del self.judge  # it refers to this object: the cycle would keep the networks in memory until garbage collection
        for network in (self.student, self.teacher):
            if network is not None:
                network.close()


class Compiled:
    """Work whose forward and backward pass and objective are compiled to a few kernels by `torch.compile`."""

    def __init__(self, work: Work) -> None:
        self.work, self.plain, self.tried = work, work.judge, False
        # The compiler counts recompilations by code: without isolation it gives up at the ninth network of a process
        # and only logs that. Earlier versions of PyTorch do not have the option.
        known = signature(torch.compile).parameters
        own: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
        work.judge = torch.compile(work.judge, dynamic=False, **own)

    @property
    def is_ready(self) -> bool:
        """Whether the step has been compiled."""
        return self.tried

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """See `Work`. If compiling fails, a warning says so and all steps run eagerly."""
        with compiled_layout(self.work.settings):
            if not self.tried:
                self._try(x, y)
            self.work(x, y)

    def _try(self, x: Tensor, y: Tensor) -> None:
        """Compile both passes without changing the network's state or the random numbers."""
        self.tried = True
        model = self.work.student.model
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        wanted = [p for p in model.parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                torch.autograd.grad(self.work.judge(x, y)[0], wanted, allow_unused=True)
        except Exception as error:  # of any kind; an error in the network itself is raised again by the eager step
            self.work.judge = self.plain
            _warn(f"found that the step cannot be compiled ({_said(error)}); the step runs eagerly")
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


class Recorder(Protocol):
    """Records work on a device and repeats it."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do the work once, to prepare the recording."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work once and record it; calling the result repeats it on the same memory."""


class CudaGraphs:
    """Records CUDA graphs. A recorded step is one launch instead of hundreds."""

    def warm(self, work: Callable[[], None]) -> None:
        """See `Recorder`. Uses a separate stream, as PyTorch requires before a recording."""
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
    """Work that is recorded after a few steps and then replayed on the same memory."""

    def __init__(self, work: Callable[[Tensor, Tensor], None], recorder: Recorder) -> None:
        self.work, self.recorder, self.warm = work, recorder, 0
        self.batch: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """See `Work`. All batches must have the same shape."""
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
        """Whether the next step is replayed."""
        return self.replay is not None

    def forget(self) -> None:
        """Discard the recording, because the computation has changed. The next step is a warm-up."""
        self.replay = self.batch = None
        self.warm = min(self.warm, WARM - 1)


Step = Work | Compiled | Recorded


def make_step(work: Work) -> Step:
    """`work`, run in the way that its settings ask for.

    Warns (ShoalWarning) if the machine, a term or a hook does not support a way, which is then not used.
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
    """The recorder for `device`, or None."""
    return CudaGraphs() if torch.device(device).type == "cuda" else None


def _unsuited(parts: Sequence[Any]) -> str | None:
    found = next((part for part in parts if not _recordable(part)), None)
    return None if found is None else f"{_name(found)}, which may compute something else at each step"


def _recordable(part: Any) -> bool:
    """Whether `part` may be recorded. Without an attribute that says so, it may unless it has `on_batch`."""
    return bool(getattr(part, "recordable", not hasattr(part, "on_batch")))


def is_steady(part: Any) -> bool:
    """Whether a recording stays valid after the epoch methods of an objective or a hook."""
    return bool(getattr(part, "recordable", not any(name.startswith("on_epoch") for name in dir(part))))


def _name(part: Any) -> str:
    return getattr(part, "name", type(part).__name__)


def _first_cause(error: BaseException) -> BaseException:
    """The error that was raised first: ending a failed recording raises another one."""
    return error if error.__context__ is None else _first_cause(error.__context__)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _warn(text: str) -> None:
    warnings.warn(text, ShoalWarning, stacklevel=2)


def explain_layout(error: RuntimeError, model: nn.Module) -> ShoalError:
    """An error with advice for a network that cannot take images in channels_last; other errors are raised again."""
    if "view size is not compatible" not in str(error):
        raise error
    return ShoalError(
        f"found a view of channels_last images at {type(unwrap(model)).__name__}; need a reshape, or a network "
        "that `assemble` has traced; write x.flatten(1), or pass Settings(channels_last=False)"
    )


def explain_single(error: ValueError) -> ShoalError:
    """An error with advice for a batch of one image that batch norms cannot use; other errors are raised again."""
    if "more than 1 value per channel" not in str(error):
        raise error
    return ShoalError(
        "found a batch of one image, with feature maps of 1x1, at a batch norm; need two values or more per channel; "
        "give another --limit, so that the last batch has more images, or larger images (--size)"
    )
