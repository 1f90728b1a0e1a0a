"""The doctor's sentence names what really bounds a run, and a setting that exists."""

from __future__ import annotations

import dataclasses
import re

import pytest

from trajdist.config_schema import fields
from trajdist.runtime.clock import STAGES
from trajdist.training.doctor import AVOIDABLE, ENOUGH_STEPS, Facts, diagnose, shares, split


def facts(time: dict[str, float], **changes: object) -> Facts:
    """A phase of 100 s on a CPU, all of whose settings could be faster."""
    plain = Facts(
        seconds=100.0,
        steps=1000,
        time=dict.fromkeys(STAGES, 0.0) | time,
        waits=[time.get("data", 0.0)],
        workers=0,
        threads=0,
        processors=8,
        overlapping=False,
        compiled=False,
        cacheable=True,
        half_precision=False,
        all_places=True,
        idle_share=0.0,
    )
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("time", "changes", "said"),
    [
        ({"data": 30, "backbone": 60}, {}, "raise data.num_workers (now 0, 8 processors"),
        ({"data": 30, "backbone": 60}, {"workers": 7}, "the 8 processors per process are all used"),
        ({"data": 30, "backbone": 60}, {"threads": 8}, "the 8 processors per process are all used"),
        ({"data": 30, "backbone": 60}, {}, "or set cache.dir"),
        ({"data": 19, "backbone": 75}, {}, "at its limit"),
        ({"backbone": 90}, {}, "backbone.compile=true and cache.dir=DIR"),
        ({"backbone": 90}, {"cacheable": False}, "backbone.compile=true makes it faster"),
        ({"backbone": 90}, {"overlapping": True}, "runtime.mixed_precision=bf16"),
        ({"backbone": 90}, {"compiled": True, "cacheable": False}, "only more processes"),
        ({"backbone": 30, "model": 60}, {}, "train.cell_fraction=0.25"),
        ({"backbone": 30, "model": 60}, {"all_places": False}, "smaller model.hidden_dim"),
        ({"sync": 25, "backbone": 65}, {}, "gradient_accumulation_steps"),
        ({"checkpoint": 12, "backbone": 80}, {}, "checkpoint.every_steps"),
        ({"validation": 25, "backbone": 70}, {}, "validation.every_epochs"),
        ({"optimizer": 30, "backbone": 65}, {}, "the optimizer (30%"),
        ({"projection": 30, "backbone": 65}, {}, "model.feature_dim"),
        ({"backbone": 60}, {}, "what comes between the steps (40%"),
        # The costliest of two avoidable things comes first.
        ({"checkpoint": 12, "data": 40, "backbone": 40}, {}, "waiting for images"),
        ({"sync": 40, "backbone": 55}, {"waits": [1.0, 38.0, 2.0]}, "number 1 waits 37 s longer"),
        ({"backbone": 90}, {"steps": ENOUGH_STEPS - 1}, "too short"),
        ({"backbone": 60, "optimizer": 30}, {"idle_share": 0.95}, "the host, which launches kernels more slowly"),
        ({"backbone": 90}, {"idle_share": 0.95}, "raise batch_size, or set backbone.compile=true."),
        ({"backbone": 90}, {"idle_share": 0.95, "compiled": True}, "raise batch_size."),
        ({"backbone": 90}, {"idle_share": 0.5}, "at its limit"),
        ({"backbone": 60}, {"idle_share": 0.95}, "what comes between the steps (40%"),
        ({"data": 30, "backbone": 60}, {"idle_share": 0.95}, "waiting for images"),
        ({}, {}, "not measured: it was resumed after its last step"),
    ],
)
def test_what_it_says(time, changes, said):
    assert said in diagnose(facts(time, **changes))


def test_waiting_for_data_behind_a_busy_device_is_no_loss():
    time = {"data": 60, "backbone": 95, "model": 80}
    assert shares(facts(time, overlapping=True))["data"] == pytest.approx(0.05)
    assert "at its limit" in diagnose(facts(time, overlapping=True))
    assert "waiting for images" in diagnose(facts({"data": 60, "backbone": 35}, overlapping=True))


def test_the_split_is_the_whole_time():
    parts = split({"data": 1.0, "model": 2.0}, 4.5)
    assert parts == {"data": 1.0, "model": 2.0, "other": 1.5}
    assert split({"backbone": 3.0, "model": 3.0}, 4.0)["other"] == 0.0


def test_every_stage_but_the_two_that_must_be_is_avoidable():
    assert set(AVOIDABLE) == {*STAGES, "other"} - {"backbone", "model"}


def test_the_settings_it_names_exist():
    known = {key for key, *_ in fields()}
    sentences = [diagnose(facts({stage: 99.0})) for stage in (*STAGES, "other")]
    sentences += [
        diagnose(facts({"model": 99.0}, all_places=False)),
        diagnose(facts({"backbone": 99}, overlapping=True)),
    ]
    named = {key for sentence in sentences for key in re.findall(r"\b[a-z]+\.[a-z_]+[a-z]\b", sentence)}
    assert named
    assert named <= known
