"""Plans: functions of iteration and seed alone."""

from __future__ import annotations

import pytest

from mmalign.plans import every_step, random_window


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
