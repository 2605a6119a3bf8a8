"""shoal: make a trained CNN shallow and ReLU-light, then run it privately between a client and a server."""

from shoal.branch import add_branches, branched_blocks, commit_branches, set_gate
from shoal.budget import Budget, allocate
from shoal.cost import Cost, cost, count
from shoal.data import Dataset, Split, load
from shoal.distill import Objective, Term
from shoal.early.cascade import Cascade, cascade
from shoal.early.dynamic import Decisions, infer
from shoal.errors import ShoalError
from shoal.exits import add_exits, keep_exit
from shoal.fold import fold
from shoal.graph import Graph, Node
from shoal.mask import MaskedReLU, add_masks
from shoal.models import build
from shoal.outputs import Outputs, forward
from shoal.recipes.shallow import Options, reduce
from shoal.run import Run
from shoal.sensitivity import pruning_sensitivity
from shoal.sites import ReluSite, find_blocks, relu_sites
from shoal.spec import Spec, assemble
from shoal.stages import train_teacher
from shoal.substitution import substitute
from shoal.surgery import trace
from shoal.train import Schedule, Settings, evaluate, fit

__all__ = [
    "Budget", "Cascade", "Cost", "Dataset", "Decisions", "Graph", "MaskedReLU", "Node", "Objective", "Options",
    "Outputs", "ReluSite", "Run", "Schedule", "Settings", "ShoalError", "Spec", "Split", "Term", "add_branches",
    "add_exits", "add_masks", "allocate", "assemble", "branched_blocks", "build", "cascade", "commit_branches",
    "cost", "count", "evaluate", "find_blocks", "fit", "fold", "forward", "infer", "keep_exit", "load",
    "pruning_sensitivity", "reduce", "relu_sites", "set_gate", "substitute", "trace", "train_teacher",
]  # fmt: skip
