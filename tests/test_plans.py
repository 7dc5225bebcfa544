"""Plans: functions of iteration and seed alone."""

from __future__ import annotations

import pytest

from mmalign.plans import every_step, random_steps, random_window, sliding_window, tail_steps, window
from mmalign.records import Plan


def test_every_step_but_the_last_is_an_action():
    (plan,) = every_step(10)(0, 0)
    assert plan.sde_steps == tuple(range(9))
    assert not plan.share_noise
    with pytest.raises(ValueError, match="at least 2"):
        every_step(1)


def test_a_window_is_the_same_for_all_and_differs_between_iterations_and_seeds():
    at = random_window(10, 2, range(4), share_noise=True)
    first = [at(i, 0)[0].sde_steps for i in range(200)]
    assert first == [at(i, 0)[0].sde_steps for i in range(200)]
    assert first != [at(i, 1)[0].sde_steps for i in range(200)]
    counts = {steps: first.count(steps) for steps in set(first)}
    assert counts.keys() == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert min(counts.values()) > 25
    assert at(0, 0)[0].share_noise


@pytest.mark.parametrize(
    ("width", "starts"), [(0, range(2)), (2, range(0)), (2, range(-1, 2)), (2, range(9))]
)
def test_a_window_must_fit(width, starts):
    with pytest.raises(ValueError, match="must"):
        random_window(10, width, starts, share_noise=False)


def test_random_steps_are_drawn_without_repeats_and_are_the_same_for_all():
    at = random_steps(10, 3, range(1, 6))
    plans = [at(i, 0)[0] for i in range(300)]
    assert plans == [at(i, 0)[0] for i in range(300)]
    assert plans != [at(i, 1)[0] for i in range(300)]
    counts = [sum(step in plan.sde_steps for plan in plans) for step in range(10)]
    assert [count > 0 for count in counts] == [False, True, True, True, True, True, *[False] * 4]
    assert min(counts[1:6]) > 140  # 180 expected
    assert {len(plan.sde_steps) for plan in plans} == {3}
    assert {plan.noisy for plan in plans} == {()}


def test_steps_that_are_not_chosen_may_draw_noise_too():
    plans = [random_steps(6, 2, range(5), noise_at_all=True)(i, 0)[0] for i in range(50)]
    assert {plan.stochastic for plan in plans} == {(0, 1, 2, 3, 4)}
    assert {len(plan.noisy) for plan in plans} == {3}


@pytest.mark.parametrize(("count", "among"), [(0, range(3)), (4, range(3)), (1, range(3, 6)), (1, range(0))])
def test_steps_that_cannot_be_drawn_are_refused(count, among):
    with pytest.raises(ValueError, match="can be drawn"):
        random_steps(6, count, among)


def test_a_window_slides_to_the_end_and_stays():
    at = sliding_window(10, 3, lambda start: 2, stride=2)
    starts = [at(i, 0)[0].sde_steps for i in range(12)]
    assert starts[:2] == [(0, 1, 2)] * 2
    assert starts[2:4] == [(2, 3, 4)] * 2
    assert starts[4:6] == [(4, 5, 6)] * 2
    assert starts[6:] == [(6, 7, 8)] * 6  # three moves, then it stays; the last step draws no noise
    assert [at(i, 5)[0] for i in range(12)] == [at(i, 0)[0] for i in range(12)]


def test_a_window_of_all_steps_is_every_step():
    assert sliding_window(6, 5, lambda start: 1)(7, 0) == every_step(6)(7, 0)


@pytest.mark.parametrize(
    ("left", "rate", "steps"),
    [
        (10, 0.0, 0),
        (10, 0.4, 4),
        (9, 0.4, 3),
        (1, 0.4, 1),
        (2, 0.2, 1),
        (21, 0.2, 4),
        (7, 1.0, 7),
        (100, 0.29, 29),
    ],
)
def test_the_tail_takes_a_share_of_the_steps_that_are_left_and_at_least_one(left, rate, steps):
    assert tail_steps(left, rate) == steps
    assert window(left + 3, 0, 3, rate=rate).tail == steps


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sde_steps": (1, 1)}, "sde_steps must rise"),
        ({"noisy": (2, 1)}, "noisy must rise"),
        ({"noisy": (4,)}, r"noisy must lie in 0\.\.3"),
        ({"sde_steps": (0, 1), "noisy": (1, 2)}, r"\[1\] are in both"),
        ({"sde_steps": (0, 1), "tail": 4}, r"lie in 0\.\.3"),
        ({"sde_steps": (0,), "noisy": (3,), "tail": 2}, r"lie in 0\.\.1"),
        ({"tail": 1, "strides": (1, 2)}, "strides"),
        ({"renoise": 1, "noisy": (0,)}, "renoise"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Plan(5, **wrong)
