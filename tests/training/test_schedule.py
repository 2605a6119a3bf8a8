"""Schedules that are given as text, and the rates that they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.errors import ShoalError
from shoal.training.schedule import SCHEDULES, Schedule, parse_schedule

TEXTS = [
    ("epochs=200", Schedule(200)),
    ("epochs=20,lr=0.05,milestones=10/15,gamma=0.2", Schedule(20, 0.05, (10, 15), 0.2)),
    ("kind=cosine,epochs=4,warmup=0.5,batch_size=32", Schedule(4, kind="cosine", warmup=0.5, batch_size=32)),
    ("epochs=3,momentum=0,weight_decay=1e-4", Schedule(3, momentum=0.0, weight_decay=1e-4)),
    ("epochs=3,nesterov=true", Schedule(3, nesterov=True)),
    ("osakd-resnet,nesterov=false", replace(SCHEDULES["osakd-resnet"], nesterov=False)),
    ("self-distillation,batch_size=64", Schedule(300, 0.1, (90, 180, 270), batch_size=64)),
    *SCHEDULES.items(),
]


@pytest.mark.parametrize(("text", "schedule"), TEXTS)
def test_text_gives_the_schedule_that_it_names(text: str, schedule: Schedule) -> None:
    assert parse_schedule(text) == schedule


WRONG = [
    ("", "found --schedule ''; need one of self-distillation, osakd, osakd-resnet, or fields such as"),
    ("paper", "found --schedule 'paper'; need one of"),
    ("lr=0.1", "found no epochs in --schedule 'lr=0.1'; need their number"),
    ("epochs=5,rate=1", "found 'rate=1' in --schedule 'epochs=5,rate=1'; need NAME=VALUE with a name of epochs, lr"),
    ("epochs=5,osakd", "found 'osakd' in --schedule"),
    ("epochs=5.5", "found 'epochs=5.5'"),
    ("epochs=5,milestones=2;3", "epochs in milestones separated by /"),
    ("epochs=5,nesterov=yes", "true or false for nesterov"),
    ("epochs=0", "found epochs 0 in --schedule 'epochs=0'; need 1 or more"),
    ("epochs=5,lr=0", "found lr 0.0"),
    ("epochs=5,lr=nan", "found lr nan"),
    ("epochs=5,milestones=3/2", "found milestones (3, 2)"),
    ("epochs=5,milestones=0/2", "found milestones (0, 2)"),
    ("epochs=5,gamma=-1", "found gamma -1.0"),
    ("epochs=5,kind=linear", "found kind 'linear' in --schedule 'epochs=5,kind=linear'; need step or cosine"),
    ("epochs=5,warmup=-1", "found warmup -1.0"),
    ("epochs=5,batch_size=0", "found batch_size 0"),
    ("epochs=5,momentum=1", "found momentum 1.0"),
    ("epochs=5,weight_decay=inf", "found weight_decay inf"),
    ("epochs=5,momentum=0,nesterov=true", "found nesterov True"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ShoalError) as refused:
        parse_schedule(text)
    assert message in str(refused.value)
