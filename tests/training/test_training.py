"""The loop, the losses, the budget and the mask learner: laws, hand-computed numbers, kills and resumes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.loading import load
from shoal.distillation.losses import kd, kl_divergence, pram
from shoal.errors import ShoalError
from shoal.networks.stored import load_network
from shoal.outputs import Outputs, forward
from shoal.reduction.budget import allocate
from shoal.reduction.learners.senet import DifferenceLearner
from shoal.reduction.masks import add_masks, check_budget, masked_sites
from shoal.reduction.sensitivity import DynamicRewiring, pruning_sensitivity
from shoal.storage.run import Run
from shoal.surgery.sites import ReluSite, relu_sites
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule, ramp
from shoal.training.settings import Settings
from tests.support.fits import DATA, OBJECTIVE, PLAN, ROOT, SHAPE, full, masked, network, same, weights_after
from tests.support.forked import forked, heard
from tests.support.waiting import HANG

ETA = (
    "0.0572 0.1854 0.2129 0.2506 0.2758 0.3549 0.4884 0.5102 0.5568 0.6739 0.8143 0.8277 0.8623 0.9410 0.9902 0.9986 1"
)
RESNET18 = [65536] + [65536] * 4 + [32768] * 4 + [16384] * 4 + [8192] * 4


def sites_of(sizes: list[int]) -> list[ReluSite]:
    return [ReluSite(f"s{i}", (n,), 0, None, None) for i, n in enumerate(sizes)]


def golden(total: int) -> list[int]:
    sites = sites_of(RESNET18)
    eta = {s.name: float(e) for s, e in zip(sites, ETA.split(), strict=True)}
    return list(allocate(sites, eta, total).counts.values())


def test_allocate_reproduces_senets_published_lists() -> None:
    """relu_reduction.md 1.1 and 6.4: the recovered vector at 49.6k leaves exactly the two S1 blocks below 0.05."""
    counts = golden(49_600)
    assert sum(counts) == 49_600
    ratios = [c / n for c, n in zip(counts, RESNET18, strict=True)]
    assert all(0.014 <= r <= 0.0211 for r in ratios[1:5])
    assert round(ratios[5], 3) == 0.054
    # The two inner ReLU layers of stage 1 hold 2.16k, which gives Table 1's 47.4k.
    assert round((49_600 - counts[1] - counts[3]) / 1000, 2) == 47.44
    # 100k: 95.17k after gating, printed as 5.8x (5.853).
    counts = golden(100_000)
    assert round(557_056 / (100_000 - counts[1] - counts[3]), 2) == 5.85


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=12),
    st.lists(st.floats(0, 1), min_size=12, max_size=12),
    st.floats(0, 1),
)
@settings(max_examples=200)
def test_allocate_is_exact_and_clipped(sizes: list[int], eta: list[float], part: float) -> None:
    sites = sites_of(sizes)
    weight = {s.name: eta[i] for i, s in enumerate(sites)}
    if not any(weight.values()):
        return
    total = max(1, round(part * sum(sizes)))
    counts = allocate(sites, weight, total).counts
    assert sum(counts.values()) == total
    assert all(0 <= counts[s.name] <= s.relus for s in sites)


def test_allocate_by_hand() -> None:
    sites = sites_of([10, 100, 100])
    # 60 x (1/2, 1/4, 1/4) = 30, 15, 15; the first holds 10, its surplus of 20 goes 10 : 10.
    assert list(allocate(sites, {"s0": 2, "s1": 1, "s2": 1}, 60).counts.values()) == [10, 25, 25]


@pytest.mark.parametrize("total", [0, -3, 211])
def test_allocate_refuses(total: int) -> None:
    with pytest.raises(ShoalError, match=f"found a budget of {total}"):
        allocate(sites_of([10, 100, 100]), {"s0": 1, "s1": 1, "s2": 1}, total)


STUDENT = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.5, 0.5, 0.0, 0.0], [3.0, -2.0, 1.0, 0.0]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
LABELS = torch.tensor([3, 0, 2])


def softmax(row: list[float], t: float = 1.0) -> list[float]:
    powers = [math.exp(v / t) for v in row]
    return [p / sum(powers) for p in powers]


def by_hand_kl(first: torch.Tensor, second: torch.Tensor, t: float) -> float:
    total = 0.0
    for p_row, q_row in zip(first.tolist(), second.tolist(), strict=True):
        p, q = softmax(p_row, t), softmax(q_row, t)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(first) * t * t


def test_losses_by_hand() -> None:
    s, t = Outputs((STUDENT,), {"a": STUDENT}), Outputs((TEACHER,), {"a": TEACHER})
    ce = -sum(math.log(softmax(r)[k]) for r, k in zip(STUDENT.tolist(), LABELS.tolist(), strict=True)) / 3
    assert cross_entropy().loss(s, None, LABELS).item() == pytest.approx(ce, abs=1e-6)
    assert kd(temperature=4).loss(s, t, LABELS).item() == pytest.approx(by_hand_kl(TEACHER, STUDENT, 4), abs=1e-6)
    reverse = kl_divergence(TEACHER, STUDENT, 4, "reverse").item()
    assert reverse == pytest.approx(by_hand_kl(STUDENT, TEACHER, 4), abs=1e-6)
    a, b = (x.flatten().tolist() for x in (STUDENT, TEACHER))
    na, nb = (math.sqrt(sum(v * v for v in x)) for x in (a, b))
    distance = math.sqrt(sum((u / na - v / nb) ** 2 for u, v in zip(a, b, strict=True)))
    assert pram(1.0, ["a"]).loss(s, t, LABELS).item() == pytest.approx(distance / 2, abs=1e-6)


def test_attention_transfer_by_hand() -> None:
    x, y = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    total = 0.0
    for i in range(3):
        maps = [[float((m[i, :, r, c] ** 2).mean()) for r in range(2) for c in range(2)] for m in (x, y)]
        norms = [math.sqrt(sum(v * v for v in m)) for m in maps]
        total += sum((u / norms[0] - v / norms[1]) ** 2 for u, v in zip(*maps, strict=True)) / 4
    s, t = Outputs((STUDENT,), {"a": x}), Outputs((TEACHER,), {"a": y})
    found = pram(1.0, ["a"], "attention-transfer").loss(s, t, LABELS).item()
    assert found == pytest.approx(total / 3, abs=1e-6)


def test_gradients_reach_the_student_only() -> None:
    logits, taught = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    s, t = Outputs((logits,), {"a": logits}), Outputs((taught,), {"a": taught})
    loss, parts = Objective((cross_entropy(), kd(), pram(2.0, ["a"])))(s, t, LABELS)
    loss.backward()
    assert logits.grad is not None
    assert taught.grad is None
    assert loss.item() == pytest.approx(sum(float(p) for p in parts.values()), abs=1e-5)
    assert set(parts) == {"cross_entropy", "kd", "pram"}


def test_schedule_and_ramp_by_hand() -> None:
    step = Schedule(180, 0.01, (90, 140, 160))
    assert [round(step.rate(e), 8) for e in (0, 89, 90, 140, 179)] == [0.01, 0.01, 0.001, 0.0001, 0.00001]
    assert step.first_drop == 90
    assert [ramp(e, 90) for e in (0, 45, 90, 120)] == [0, 0.5, 1, 1]
    assert ramp(45, 90, "cosine") == pytest.approx(0.5)
    cosine = Schedule(10, 0.1, kind="cosine")
    assert cosine.rate(0) == 0.1
    assert cosine.rate(5) == pytest.approx(0.05)


def test_fit_learns_and_is_deterministic(tmp_path: Path) -> None:
    first = weights_after(None, PLAN)
    assert same(first, weights_after(tmp_path, PLAN))
    assert not same(first, weights_after(None, PLAN, seed=1))
    model = network()
    model.load_state_dict(first)
    assert evaluate(model, DATA, DATA.test)[0] > 90
    with pytest.raises(ShoalError, match="empty split"):
        evaluate(model, DATA, DATA.test.take(torch.arange(0)))


def test_rewiring_keeps_the_density_and_gives_a_sensitivity() -> None:
    model = network()
    sites = relu_sites(model, SHAPE)
    hook = DynamicRewiring(model, PLAN.epochs, 0.25, per_epoch=3)
    total = sum(m.numel() for m in hook.masks.values())
    before = sum(int(m.sum()) for m in hook.masks.values())
    fit(model, DATA, OBJECTIVE, PLAN, hooks=(hook,))
    assert sum(int(m.sum()) for m in hook.masks.values()) == before
    assert abs(before / total - 0.25) < 0.02
    eta = pruning_sensitivity(hook.densities(), sites)
    assert set(eta) == {s.name for s in sites}
    assert all(0 <= v < 1 for v in eta.values())


@pytest.mark.parametrize("score", ["published", "counterfactual"])
def test_difference_learner_takes_the_top_k_of_the_summed_difference(score: str) -> None:
    student, budget = masked()
    teacher = network().eval()
    learner = DifferenceLearner(budget, score=score)
    learner.on_epoch_start(student, 0)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in masked_sites(student).items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach().clone()}))
    sums: dict[str, torch.Tensor] = {}
    for _ in range(3):
        x = torch.randn(4, *SHAPE)
        s, t = forward(student, x, learner.taps), forward(add_masks(teacher, full(student)), x, learner.taps)
        learner.on_batch(s, t)
        for name in learner.taps:
            own = s.taps[name] if score == "published" else inputs[name]
            sums[name] = sums.get(name, 0) + (own - t.taps[name]).abs().sum(0).detach()
    learner.on_epoch_end(student, 0)
    check_budget(student, budget)
    for name, module in masked_sites(student).items():
        kept, rest = sums[name][module.mask], sums[name][~module.mask]
        assert not len(kept) or not len(rest) or kept.min() >= rest.max()


def test_fit_with_teacher_masks_and_bf16_runs() -> None:
    student, budget = masked()
    objective = Objective((cross_entropy(0.5), kd(0.5)))
    teacher = add_masks(network(), full(student))
    history = fit(
        student,
        DATA,
        objective,
        PLAN,
        teacher=teacher,
        hooks=(DifferenceLearner(budget),),
        settings=Settings(precision="bf16"),
    )
    check_budget(student, budget)
    assert {"loss", "cross_entropy", "kd", "mask_change", "accuracy"} <= set(history.rows[-1])


def train_as(pipe: Connection, rank: int, meeting: Path) -> None:
    """One of two processes that train together; says its rank, the sum of its weights, and the best accuracy."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = network()
    history = fit(model, DATA, OBJECTIVE, PLAN, settings=Settings())
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    pipe.send((torch.distributed.get_rank(), total, history.best))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_gloo_processes_train_one_model(tmp_path: Path) -> None:
    with forked(train_as, 0, tmp_path / "meeting") as (_, one), forked(train_as, 1, tmp_path / "meeting") as (_, two):
        lines = [heard(pipe) for pipe in (one, two)]
    assert [line[0] for line in lines] == [0, 1]
    assert lines[0][1] == pytest.approx(lines[1][1], abs=1e-9)
    assert lines[0][2] > 80


@pytest.mark.slow
def test_torchrun_trains_one_run_with_the_command(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shoal"]
    network = ["train", "resnet10", "--data", "digits", "--width", "0.125", "--limit", "300", "--epochs", "2"]
    done = subprocess.run(
        [*torchrun, *network, "--out", str(tmp_path / "run"), "--json"],
        capture_output=True, text=True, timeout=HANG, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    body = json.loads(done.stdout)  # of the first process alone
    run = Run(tmp_path / "run")
    assert [row["epoch"] for row in run.metrics()] == [0, 1]
    spec, model = load_network(run)
    data = load("digits", limit=300)
    assert body["accuracy"] == pytest.approx(evaluate(model, data, data.test)[-1])
    assert body["params"] == sum(p.numel() for p in model.parameters())
    assert spec.base == "resnet10"


def test_timing_is_recorded() -> None:
    begun = time.monotonic()
    history = fit(network(), DATA, OBJECTIVE, replace(PLAN, epochs=1))
    assert 0 < history.rows[0]["seconds"] < time.monotonic() - begun
