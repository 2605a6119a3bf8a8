"""Fits that stop, are killed, fail or lose their files, and go on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.distillation.losses import kd
from shoal.errors import ShoalError
from shoal.reduction.learners.senet import DifferenceLearner
from shoal.reduction.masks import add_masks
from shoal.reduction.sensitivity import DynamicRewiring
from shoal.storage.checkpoint import Checkpoint
from shoal.storage.run import Run
from shoal.storage.tensors import load_state, load_weights, write_tensors
from shoal.training.clock import Clock
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy, switched
from shoal.training.settings import Settings
from tests.conftest import Residual
from tests.support.fits import DATA, OBJECTIVE, PLAN, full, kill_in_the_middle, masked, network, same, weights_after


def stopping_after(laps: int) -> Any:
    """A clock that lets so many steps and judgements begin."""
    clock, asked = Clock(None), []
    clock.has_time_for = lambda kind: asked.append(kind) or len(asked) <= laps  # type: ignore[method-assign]
    return clock


def test_the_first_lap_always_runs_and_what_has_been_done_is_kept(tmp_path: Path) -> None:
    def go(resume: bool) -> Any:
        settings = Settings(max_seconds=0.0, resume=resume)
        return fit(network(), DATA, OBJECTIVE, PLAN, settings=settings, checkpoint=Checkpoint(tmp_path))

    steps = len(DATA.train) // PLAN.batch_size
    for call in range(1, steps + 2):  # each step, then the judgement of the epoch
        history = go(call > 1)
        assert history.stopped
        assert len(history.rows) == (call > steps)
        assert Checkpoint(tmp_path).read_last().progress.get("step", 0) == call % (steps + 1)


def distilling(folder: Path, laps: int | None, resume: bool = False) -> Any:
    """A fit with teacher, dropout, augmentation and mask learner, perhaps stopped; returns what decides the rest."""
    student, budget = masked()
    student.fc = torch.nn.Sequential(torch.nn.Dropout(0.3), student.fc)
    objective, hook = Objective((cross_entropy(0.5), kd(switched(0.5, 0.2, 1)))), DifferenceLearner(budget)
    settings, data = Settings(resume=resume), replace(DATA, augment="crop-flip")
    clock = stopping_after(laps) if laps else Clock(None)
    more: Any = {
        "teacher": add_masks(network(), full(student)),
        "hooks": (hook,),
        "clock": clock,
        "checkpoint": Checkpoint(folder),
    }
    history = fit(student, data, objective, replace(PLAN, epochs=3), settings=settings, **more)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    return history.stopped, student.state_dict(), rows


@pytest.mark.parametrize("laps", [1, 2, 9, 17, 18, 19, 30])
def test_a_stop_at_any_step_changes_nothing(tmp_path: Path, laps: int) -> None:
    _, weights, rows = distilling(tmp_path / "whole", None)
    assert distilling(tmp_path / "parts", laps)[0]
    distilling(tmp_path / "parts", 5, resume=True)
    stopped, again, rows_again = distilling(tmp_path / "parts", None, resume=True)
    assert not stopped
    assert same(weights, again)
    assert rows == rows_again


def test_one_clock_counts_several_fits() -> None:
    clock = Clock(0.0)
    first = fit(network(), DATA, OBJECTIVE, replace(PLAN, epochs=1), clock=clock)
    second = fit(network(), DATA, OBJECTIVE, PLAN, clock=clock)
    assert (first.stopped, second.stopped) == (True, True)
    assert not fit(network(), DATA, OBJECTIVE, replace(PLAN, epochs=2), clock=Clock(None)).stopped


def test_a_clock_leaves_time_for_a_checkpoint() -> None:
    clock = Clock(100.0)
    assert clock.has_time_for("step")
    clock.lap("save", 60.0)
    assert clock.has_time_for("step")
    clock.lap("step", 30.0)
    assert clock.has_time_for("step")
    clock.lap("step", 50.0)
    assert not clock.has_time_for("step")
    assert clock.has_time_for("judgement")
    for _ in range(16):  # a slow lap is forgotten in time
        clock.lap("step", 1.0)
    assert clock.has_time_for("step")


def test_checkpoints_wait_for_their_seconds_and_the_last_is_always_written(tmp_path: Path) -> None:
    written = []

    class Noted(Checkpoint):
        def save_last(self, *args: Any) -> None:
            written.append(args[-1]["epoch"])
            super().save_last(*args)

    for seconds, expected in ((0.0, [0, 1, 2, 3]), (3600.0, [3])):
        written.clear()
        settings = Settings(save_seconds=seconds)
        fit(network(), DATA, OBJECTIVE, PLAN, settings=settings, checkpoint=Noted(tmp_path / f"{seconds:g}"))
        assert written == expected


def train_at(folder: Path, progress: Any) -> None:
    fit(network(), DATA, OBJECTIVE, PLAN, checkpoint=Checkpoint(folder), progress=progress)


@pytest.mark.slow
def test_kill_dash_nine_then_resume_is_bit_identical(tmp_path: Path) -> None:
    kill_in_the_middle(train_at, tmp_path)
    assert (tmp_path / "model.last.safetensors").exists()
    assert same(weights_after(tmp_path, PLAN, resume=True), weights_after(None, PLAN))


@pytest.mark.parametrize("laps", [3, 16, 17, 20, 33])
def test_rewiring_goes_on_at_any_step(tmp_path: Path, laps: int) -> None:
    """Also from the moment before an epoch is judged, at which nothing but its own memory is at hand."""

    def densities(clock: Clock, resume: bool) -> dict[str, float]:
        model = network()
        hook = DynamicRewiring(model, PLAN.epochs, 0.3, per_epoch=2)
        settings, checkpoint = Settings(resume=resume), Checkpoint(tmp_path / str(laps)) if laps else None
        fit(model, DATA, OBJECTIVE, PLAN, hooks=(hook,), settings=settings, checkpoint=checkpoint, clock=clock)
        return hook.densities()

    densities(stopping_after(laps), resume=False)
    again = densities(Clock(None), resume=True)
    model = network()
    hook = DynamicRewiring(model, PLAN.epochs, 0.3, per_epoch=2)
    fit(model, DATA, OBJECTIVE, PLAN, hooks=(hook,))
    assert again == hook.densities()


def test_resume_restores_a_hook_too(tmp_path: Path) -> None:
    def run(folder: Path | None, stop: bool = False, resume: bool = False) -> DynamicRewiring:
        model = network()
        hook = DynamicRewiring(model, PLAN.epochs, 0.3, per_epoch=2)
        options = Settings(max_seconds=0.0 if stop else None, resume=resume)
        checkpoint = Checkpoint(folder) if folder else None
        fit(model, DATA, OBJECTIVE, PLAN, hooks=(hook,), settings=options, checkpoint=checkpoint)
        return hook

    whole = run(None)
    run(tmp_path, stop=True)
    assert run(tmp_path, resume=True).densities() == whole.densities()


def test_a_stop_never_writes_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    fit(network(), DATA, OBJECTIVE, replace(PLAN, epochs=1), checkpoint=Checkpoint(tmp_path))
    good = (tmp_path / "model.last.safetensors").read_bytes()
    wild, settings = replace(PLAN, lr=1e30), Settings(resume=True)
    with pytest.raises(ShoalError, match=r"found loss = (nan|inf) in epoch 1; .*the checkpoint of epoch 0 is kept"):
        fit(
            network(), DATA, OBJECTIVE, wild, settings=settings, checkpoint=Checkpoint(tmp_path),
            clock=stopping_after(9),
        )  # fmt: skip
    assert (tmp_path / "model.last.safetensors").read_bytes() == good


def test_epochs_that_a_kill_has_repeated_count_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for epoch, accuracy in ((0, 1.0), (1, 2.0), (2, 3.0), (1, 2.5), (2, 3.5), (3, 4.0)):
        run.log("finetune", {"epoch": epoch, "accuracy": accuracy})
    run.log("mask", {"epoch": 1, "accuracy": 9.0})
    assert [(row["epoch"], row["accuracy"]) for row in run.metrics()] == [(0, 1), (1, 2.5), (2, 3.5), (3, 4), (1, 9)]


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = network()
    fit(model, DATA, OBJECTIVE, replace(PLAN, epochs=1), checkpoint=Checkpoint(tmp_path))
    good = (tmp_path / "model.last.safetensors").read_bytes()
    wild = replace(PLAN, lr=1e30)
    with pytest.raises(ShoalError, match=r"found loss = nan in epoch 1"):
        fit(network(), DATA, OBJECTIVE, wild, settings=Settings(resume=True), checkpoint=Checkpoint(tmp_path))
    assert (tmp_path / "model.last.safetensors").read_bytes() == good


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "w.safetensors"
    write_tensors(target, {"a": torch.ones(2)})
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ShoalError, match="No space left"):
        write_tensors(target, {"a": torch.zeros(2)})
    assert torch.equal(load_weights(target)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [target]


def test_checkpoints_of_other_models_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    weights_after(tmp_path, replace(PLAN, epochs=1))
    with pytest.raises(ShoalError, match="another model"):
        load_state(Residual(classes=7), load_weights(tmp_path / "model.best.safetensors"), "there")
    blob = (tmp_path / "model.last.safetensors").read_bytes()
    for damaged in (blob[:40], blob[: len(blob) // 2], b"", b"\x00" * 64):
        (tmp_path / "model.last.safetensors").write_bytes(damaged)
        with pytest.raises(ShoalError, match="unreadable weight file"):
            weights_after(tmp_path, PLAN, resume=True)
