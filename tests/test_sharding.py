"""Who gets which image when: every image once per epoch, whatever the processes, the batches and the restarts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trajdist.config_files import load_config
from trajdist.sharding import PlaceDraw, Plan, Selection, Slots, digest, key64, permute
from trajdist.training.selection import SetFacts, training_plan

PLANS = st.builds(
    lambda images, epochs, batch, accumulation, world: Plan(images, epochs, world * batch * accumulation, world, batch),
    images=st.integers(1, 60),
    epochs=st.integers(1, 3),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 5),
)

# Runs that are resumed with a newer trajdist rely on these numbers.
GOLDEN_KEY = 6768782832058643234
GOLDEN_ORDER = [4, 2, 3, 6, 8, 9, 7, 0, 1, 5]
GOLDEN_TRAIN = [55, 10, 65, 96, 8, 33, 11, 47]
GOLDEN_HOLDOUT = [6, 53, 92, 22, 78]
GOLDEN_DIGEST = 11106649177
GOLDEN_PLACES = [[0, 1, 3, 6], [0, 1, 3, 6]]


def with_world(plan: Plan, world: int, batch_size: int) -> Plan:
    """The same run on other processes: the global batch stays."""
    return Plan(plan.num_images, plan.num_epochs, plan.global_batch, world, batch_size)


def positions(plan: Plan, cursor: int = 0) -> list[tuple[int, int]]:
    return [(slots.epoch, position) for slots in plan.shares(cursor) for position in range(slots.start, slots.stop)]


@given(PLANS)
def test_every_position_once_per_epoch(plan):
    everything = [(epoch, position) for epoch in range(plan.num_epochs) for position in range(plan.num_images)]
    assert Counter(positions(plan)) == Counter(everything)
    ends = [plan.cursor_after(step) for step in plan.steps() if step.ends_epoch]
    assert ends == [plan.num_images * (epoch + 1) for epoch in range(plan.num_epochs)]


@given(PLANS)
def test_processes_take_equally_many_equally_large_micro_batches(plan):
    shares = list(plan.shares())
    # Accelerate deals them out in turn.
    by_process = [shares[process :: plan.world] for process in range(plan.world)]
    assert {len(mine) for mine in by_process} == {plan.total_steps * plan.micro_batches}
    assert {len(slots) for slots in shares} == {plan.slots}
    assert plan.slots <= plan.batch_size
    assert all(slots.start <= slots.stop <= slots.start + slots.size for slots in shares)
    for process, mine in enumerate(by_process):
        wanted = [plan.micro_batch(s, micro, process) for s in plan.steps() for micro in range(plan.micro_batches)]
        assert mine == wanted


@given(PLANS, st.integers(1, 5), st.integers(1, 9), st.data())
def test_another_number_of_processes_goes_on_exactly(plan, world, batch_size, data):
    stopped_after = data.draw(st.integers(0, plan.total_steps - 1))
    cursor = plan.cursor_after(plan.step(stopped_after))
    resumed = with_world(plan, world, batch_size)
    assert list(resumed.steps(cursor)) == list(plan.steps())[stopped_after + 1 :]
    assert Counter(positions(resumed, cursor)) == Counter(positions(plan)[cursor:])
    assert len(positions(resumed, cursor)) == plan.total_images - cursor


def test_the_global_batch_is_that_of_the_processes_that_a_run_began_with():
    config = load_config("debug", ["data.imagenet.batch_size=4", "data.imagenet.gradient_accumulation_steps=3"])
    selection = Selection.draw(100, -1, 0.1, seed=0, phase=1)
    plans = [training_plan(config, selection, 2, world) for world in (1, 2, 4)]
    assert [(plan.world, plan.global_batch, plan.num_images) for plan in plans] == [(n, 24, 90) for n in (1, 2, 4)]


def test_shards_of_another_number_of_images_than_a_run_has_are_no_facts():
    assert SetFacts(num_images=5, shard_sizes=[2, 3]).num_images == 5
    with pytest.raises(ValidationError, match="its shard_sizes do not add up to 5"):
        SetFacts(num_images=5, shard_sizes=[2, 2])


@given(PLANS)
def test_a_cursor_inside_a_step_is_refused(plan):
    step = plan.step(0)
    if step.num_images > 1:
        with pytest.raises(ValueError, match="inside a step"):
            plan.step_index_at(plan.cursor_after(step) - 1 if step.num_images == plan.global_batch else 1)


def test_permute_is_a_bijection():
    for size in range(1, 2001):
        shuffled = permute(np.arange(size), size, key=size)
        assert np.array_equal(np.sort(shuffled), np.arange(size)), size


def test_permute_of_some_positions_is_part_of_the_whole():
    whole = permute(np.arange(1_281_167), 1_281_167, key=3)
    some = np.array([0, 1_281_166, 77, 640_000])
    assert np.array_equal(permute(some, 1_281_167, key=3), whole[some])
    assert np.array_equal(np.sort(whole), np.arange(1_281_167))


def test_permute_shuffles():
    shuffled = permute(np.arange(10_000), 10_000, key=1)
    correlation = np.corrcoef(np.arange(10_000), shuffled)[0, 1]
    assert abs(correlation) < 0.05
    other = permute(np.arange(10_000), 10_000, key=2)
    assert (shuffled == other).sum() < 20


def test_the_order_of_the_images_never_changes():
    assert key64(0, 1, 2) == GOLDEN_KEY
    assert permute(np.arange(10), 10, key=7).tolist() == GOLDEN_ORDER
    selection = Selection.draw(100, -1, 0.1, seed=5, phase=1)
    assert selection.train(3, np.arange(8)).tolist() == GOLDEN_TRAIN
    assert selection.holdout(0, np.arange(5)).tolist() == GOLDEN_HOLDOUT
    assert digest(np.arange(5)) == GOLDEN_DIGEST


@given(
    st.integers(1, 300), st.integers(-1, 400), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1), st.data()
)
def test_selection(total, num_samples, holdout_fraction, seed, data):
    phase = data.draw(st.sampled_from([1, 2]))
    selection = Selection.draw(total, num_samples, holdout_fraction, seed, phase)
    epochs = [selection.train(epoch, np.arange(selection.num_train)) for epoch in range(2)]
    held_out = selection.holdout(0, np.arange(selection.num_holdout))
    assert set(epochs[0].tolist()) == set(epochs[1].tolist())
    assert len(set(epochs[0].tolist())) == selection.num_train
    assert len(set(held_out.tolist())) == selection.num_holdout
    assert not set(epochs[0].tolist()) & set(held_out.tolist())
    assert {*epochs[0].tolist(), *held_out.tolist()} <= set(range(total))
    assert selection.num_train == (
        total - selection.num_holdout if num_samples < 0 else min(num_samples, total - selection.num_holdout)
    )
    assert num_samples == 0 or selection.num_train > 0


def test_the_first_of_the_held_out_images_stay_if_fewer_are_held_out():
    all_of_them, three = (Selection.draw(100, -1, 0.1, 5, 1, max_holdout=most) for most in (None, 3))
    assert (all_of_them.num_holdout, three.num_holdout, three.num_train) == (10, 3, 97)
    positions = np.arange(3)
    assert np.array_equal(three.holdout(0, positions), all_of_them.holdout(0, positions))
    assert Selection.draw(100, -1, 0.1, 5, 1, max_holdout=10) == all_of_them


def test_a_split_that_is_taken_over_holds_out_the_same_images_in_another_order():
    first, second = Selection.draw(100, -1, 0.1, 5, 1), Selection.draw(100, -1, 0.1, 5, 2, split_of=1)
    assert np.array_equal(second.holdout(0, np.arange(10)), first.holdout(0, np.arange(10)))
    trained = [each.train(0, np.arange(90)) for each in (first, second)]
    assert set(trained[0].tolist()) == set(trained[1].tolist())
    assert not np.array_equal(*trained)


def test_epochs_differ_in_order_and_seeds_in_what_is_held_out():
    draws = [Selection.draw(200, -1, 0.2, seed, 1) for seed in (0, 1)]
    first, second = (draws[0].train(epoch, np.arange(160)) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    held_out = [set(draw.holdout(0, np.arange(40)).tolist()) for draw in draws]
    assert held_out[0] != held_out[1]


@given(st.lists(st.integers(0, 10**7), unique=True, max_size=50), st.randoms())
def test_digest_ignores_the_order_but_sees_a_swap(indices, random):
    shuffled = random.sample(indices, len(indices))
    assert digest(np.array(indices, np.int64)) == digest(np.array(shuffled, np.int64))
    half = len(indices) // 2
    parts = [digest(np.array(part, np.int64)) for part in (indices[:half], indices[half:])]
    assert sum(parts) == digest(np.array(indices, np.int64))
    if indices:
        assert digest(np.array([*indices[1:], 10**7 + 1], np.int64)) != digest(np.array(indices, np.int64))


def test_places_are_drawn_for_each_image_alone():
    """However the epoch is cut into batches; differently in another epoch, phase or run."""
    draw = PlaceDraw(49, 12, seed=3, phase=1)
    whole = draw(Slots(2, 0, 30, 30))
    parts = [draw(Slots(2, start, min(start + 7, 30), 7)) for start in range(0, 30, 7)]
    assert np.array_equal(np.concatenate(parts)[:30], whole)
    assert all(len(set(row)) == 12 and row == sorted(row) and 0 <= row[0] <= row[-1] < 49 for row in whole.tolist())
    others = [PlaceDraw(49, 12, 4, 1)(Slots(2, 0, 30, 30)), PlaceDraw(49, 12, 3, 2)(Slots(2, 0, 30, 30))]
    others.append(draw(Slots(3, 0, 30, 30)))
    assert all((other != whole).any(1).all() for other in others)


def test_every_place_is_as_likely_as_any_other():
    """So the mean loss of the drawn places expects that of all."""
    rows = PlaceDraw(49, 12, seed=0, phase=1)(Slots(0, 0, 20_000, 20_000))
    counts = np.bincount(rows.ravel(), minlength=49)
    expected, spread = 20_000 * 12 / 49, np.sqrt(20_000 * 12 / 49 * 37 / 49)
    assert np.abs(counts - expected).max() < 4.5 * spread
    # And whether one is drawn says little of another.
    together = np.array([((rows == 0).any(1) & (rows == other).any(1)).sum() for other in range(1, 49)])
    share = 12 / 49 * 11 / 48
    assert np.abs(together - 20_000 * share).max() < 4.5 * np.sqrt(20_000 * share * (1 - share))


def test_places_golden():
    assert PlaceDraw(9, 4, seed=0, phase=1)(Slots(0, 0, 2, 2)).tolist() == GOLDEN_PLACES
