"""A module with the results of tracing it, so that code that needs several of them traces only once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from torch import fx, nn

from shoal.errors import ShoalError
from shoal.graph.graph import Graph
from shoal.surgery.normal_form import module_calls
from shoal.surgery.sites import Block, ReluSite, blocks_in, sites_in
from shoal.surgery.tracing import graph_of, shapes, trace


@dataclass(frozen=True, eq=False)
class Traced:
    """`module` traced for inputs of `shape` ([C, H, W]). Each property is computed when it is first read.

    The structure is cached: the normal form, node shapes, `sites` and `blocks`. Weights are not: the normal form shares
    its parameters and buffers with `module`, and every read of `graph` copies their current values. So a `Traced`
    remains valid while training or `load_state_dict` change `module` in place. Make a new one after submodules,
    parameters or buffers were replaced by others, and after a move to another device. Every property raises ShoalError
    for a module that cannot be traced or that fails on inputs of `shape`.
    """

    module: nn.Module
    shape: tuple[int, ...]

    @cached_property
    def normal(self) -> fx.GraphModule:
        """The normal form in eval mode, with the shape of each node, without the batch, in ``meta["shape"]``.

        Do not change it; `surgery.normal_form.edit` and `surgery.tracing.shapes` make copies that may be changed.
        """
        return _sharing(shapes(self.module, self.shape), self.module)

    @cached_property
    def calls(self) -> dict[str, fx.Node]:
        """The node of `normal` that calls each submodule, by the submodule's name."""
        return module_calls(self.normal)

    @cached_property
    def sites(self) -> tuple[ReluSite, ...]:
        """All ReLU sites in execution order. Raises ShoalError for a module without any ReLU."""
        return sites_in(self.normal)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that could each be replaced by one convolution, in execution order."""
        return blocks_in(self.normal)

    @property
    def graph(self) -> Graph:
        """A `Graph` with copies of the current weights. It is not cached, so keep the result for repeated use."""
        return graph_of(self.normal) if self._shares_all else trace(self.module, self.shape)

    @cached_property
    def _shares_all(self) -> bool:
        # Weights of another type and those that are computed from others cannot be shared.
        own = {id(t) for t in chain(self.module.parameters(), self.module.buffers())}
        return all(id(t) in own for t in chain(self.normal.parameters(), self.normal.buffers()))

    def shape_at(self, name: str) -> tuple[int, ...]:
        """The shape of the result of submodule `name`, without the batch.

        Raises ShoalError when no submodule of this name is called.
        """
        if name not in self.calls:
            raise ShoalError(f"found no submodule {name!r} to read; need one that is called; see relu_sites")
        found: tuple[int, ...] = self.calls[name].meta["shape"]
        return found


def _sharing(normal: fx.GraphModule, module: nn.Module) -> fx.GraphModule:
    """`normal` with its copied tensors replaced by those of `module`.

    Done after tracing, since running the forward pass may change the tensors that it runs on.
    """
    held = dict(chain(normal.named_parameters(remove_duplicate=False), normal.named_buffers(remove_duplicate=False)))
    own = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in own:
        if name in held and held[name].dtype == tensor.dtype:
            owner, _, leaf = name.rpartition(".")
            setattr(normal.get_submodule(owner), leaf, tensor)
    return normal
