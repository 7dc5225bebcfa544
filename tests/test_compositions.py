"""Every composition of rewards against the numbers and laws of its paper."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import names

from mmalign.composition import TOTAL, Composer, at
from mmalign.compositions import (
    COMPOSITIONS,
    GDPO,
    MARBLE,
    Constrained,
    Gated,
    Limit,
    LogSigmoid,
    Ordered,
    Product,
    WeightedSum,
    duel,
    log_sigmoid_centered,
)
from mmalign.contracts import RewardError
from mmalign.credit import Credit, Peers
from mmalign.records import Outcome, RewardSignal, Trajectory, Unit

NAN = math.nan


def signal(name, values) -> RewardSignal:
    return RewardSignal(name, torch.tensor(values)[:, None])


def total(composition, values, weights=None, groups=1, iteration=0):
    """The total of each sample (NaN: no verdict), and the metrics; values: by reward, a number a sample."""
    size = len(next(iter(values.values())))
    prompts = names(groups, size // groups)
    composer = composition.build({name: {0: (weights or {}).get(name, 1.0)} for name in values})
    composed = composer(
        [signal(name, rows) for name, rows in values.items()], Outcome(prompts, []), Peers(prompts), iteration
    )
    found = next(s for s in composed.signals if s.name == TOTAL)
    assert composed.weights == {**dict.fromkeys(values, 0.0), TOTAL: 1.0}
    return torch.where(found.valid, found.values.double(), NAN)[:, 0], composed.metrics


def near(found, expected):
    assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True, atol=1e-6, rtol=0)


# Weights over the iterations


def test_a_schedule_goes_straight_between_its_points_and_is_level_outside():
    schedule = {10: 2.0, 30: 1.0}
    assert [at(schedule, i) for i in (0, 10, 20, 30, 99)] == [2.0, 2.0, 1.5, 1.0, 1.0]
    assert at({0: 0.7}, 5) == 0.7
    assert [at({29: 1.0, 30: 3.0}, i) for i in (29, 30)] == [1.0, 3.0]  # two stages


def test_weights_of_the_iteration_reach_the_credit():
    composer = Composer({"a": {0: 1.0, 10: 0.0}, "b": {0: 0.5}})
    composed = composer(
        [signal("a", [1.0]), signal("b", [2.0])], Outcome(names(1, 1), []), Peers(names(1, 1)), 5
    )
    assert composed.weights == {"a": 0.5, "b": 0.5}
    assert composed.metrics == {"weight/a": 0.5, "weight/b": 0.5}


def test_an_iteration_without_any_reward_is_refused_before_the_run():
    with pytest.raises(ValueError, match="iteration 10 no reward"):
        Composer({"a": {0: 1.0, 10: 0.0}, "b": {0: 0.0}})


# Sums


def advantage(composition, values, groups, weights=None):
    size = len(next(iter(values.values())))
    prompts = names(groups, size // groups)
    trajectory = Trajectory(
        Outcome(prompts, []), torch.zeros(size, 1), torch.ones(size, 1, dtype=torch.bool), {}
    )
    composer = composition.build({name: {0: (weights or {}).get(name, 1.0)} for name in values})
    credit = composer.credit(Credit(composer.shares, clip=100.0))
    rows = [signal(name, column) for name, column in values.items()]
    composed = composer(rows, trajectory.outcome, Peers(prompts), 0)
    return credit(composed.signals, trajectory, lambda *_: torch.ones(1, 1, 1))


ROWS = {"a": [0.0, 1.0, 2.0, 5.0, 3.0, 1.0], "b": [3.0, 1.0, 0.0, 0.0, 1.0, 4.0]}


def test_gdpo_is_blind_to_the_scale_of_each_reward_and_the_plain_sum_is_not():
    scaled = {"a": [1000 * x for x in ROWS["a"]], "b": ROWS["b"]}
    one, other = (advantage(GDPO(), rows, 2).values for rows in (ROWS, scaled))
    assert_close(one, other, atol=1e-3, rtol=0)
    plain = [advantage(WeightedSum(), rows, 2).values for rows in (ROWS, scaled)]
    assert (plain[0] - plain[1]).abs().max() > 0.5


def test_gdpo_is_the_sum_of_z_scores_brought_to_deviation_1_over_the_batch():
    weights = {"a": 1.0, "b": 0.5}
    found = advantage(GDPO(), ROWS, 2, weights).values[0, :, 0].double()
    parts = [torch.tensor(ROWS[n], dtype=torch.float64).reshape(2, 3) for n in ("a", "b")]
    z = [(p - p.mean(1, keepdim=True)) / (p.std(1, keepdim=True, correction=0) + 1e-4) for p in parts]
    mixed = (z[0] + 0.5 * z[1]).flatten()
    assert_close(found, (mixed - mixed.mean()) / (mixed.std(correction=0) + 1e-4), atol=1e-5, rtol=0)
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-3)
    left = advantage(GDPO(standardize=False), ROWS, 2, weights).values[0, :, 0].double()
    assert_close(left, mixed, atol=1e-5, rtol=0)


def test_with_one_reward_gdpo_is_the_z_score_then_the_batch():
    found = advantage(GDPO(), {"a": ROWS["a"]}, 2).values[0, :, 0]
    plain = advantage(GDPO(standardize=False), {"a": ROWS["a"]}, 2).values[0, :, 0]
    assert_close(found, plain / plain.std(correction=0), atol=1e-3, rtol=0)


def test_marble_keeps_rewards_apart_and_a_missing_one_changes_no_other():
    found = advantage(MARBLE(), ROWS, 2)
    assert found.names == ("a", "b")
    assert found.values.shape[0] == 2
    holes = {"a": [NAN] * 6, "b": ROWS["b"]}
    missing = advantage(MARBLE(), holes, 2)
    assert torch.equal(missing.values[1], found.values[1])
    assert missing.values[0].abs().max() == 0
    assert torch.equal(missing.weight, found.weight)


# Products


def test_factors_multiply_the_primary_down():
    rows = {"p": [2.0, 2.0, 2.0, 0.0], "f": [1.0, 0.0, 0.25, 1.0], "g": [1.0, 1.0, 0.5, 1.0]}
    near(total(Product("p"), rows)[0], [2.0, 0.0, 0.25, 0.0])
    near(total(Product("p"), rows, {"f": 0.5, "p": 3.0})[0], [6.0, 0.0, 1.5, 0.0])


@settings(max_examples=50)
@given(st.floats(0, 9), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_product_lies_between_0_and_the_primary_and_rises_with_every_factor(p, f, more, g):
    low, high = sorted((f, more))
    found = total(Product("p"), {"p": [p, p], "f": [low, high], "g": [g, g]})[0]
    assert (found >= 0).all()
    assert (found <= p * (1 + 1e-6)).all()
    assert found[0] <= found[1]


def test_side_terms_win_under_the_sum_and_lose_under_the_product():
    rows = {"p": [0.1, 1.0], "f": [1.0, 0.5], "g": [1.0, 0.5]}
    multiplied = total(Product("p"), rows)[0]
    added = [sum(column) for column in zip(*rows.values(), strict=True)]
    assert added[0] > added[1]
    assert multiplied[0] < multiplied[1]


def test_a_hard_rule_makes_the_whole_reward_0_and_is_counted():
    found, metrics = total(Product("p", least={"f": 0.5}), {"p": [2.0, 2.0, 2.0], "f": [0.4, 0.5, 1.0]})
    near(found, [0.0, 1.0, 2.0])
    assert metrics["composition/passed"] == pytest.approx(2 / 3)


def test_what_is_no_factor_is_refused_or_mapped():
    with pytest.raises(RewardError, match=r"'p' must lie in 0..inf"):
        total(Product("p"), {"p": [-1.0], "f": [0.5]})
    with pytest.raises(RewardError, match=r"'f' must lie in 0..1.*composition.ranges.f"):
        total(Product("p"), {"p": [1.0], "f": [3.0]})
    near(
        total(Product("p", ranges={"f": (2.0, 4.0)}), {"p": [1.0] * 3, "f": [3.0, 9.0, 0.0]})[0], [0.5, 1, 0]
    )


def test_a_group_that_is_gated_as_a_whole_has_no_advantage():
    found = advantage(Product("p"), {"p": [1.0, 2.0, 1.0, 2.0], "f": [0.0, 0.0, 1.0, 1.0]}, 2)
    values = found.values.flatten()
    assert values[:2].abs().max() == 0
    assert values[2:].abs().min() > 0.5


# Gates


GATED = Gated(("a", "b", "c"), {"a": 0.5, "b": 0.2})


def test_a_reward_counts_only_behind_open_gates_and_the_threshold_itself_is_closed():
    rows = {"a": [0.5, 0.6, 0.6, 0.4], "b": [1.0, 0.1, 0.3, 1.0], "c": [9.0, 9.0, 9.0, 9.0]}
    found, metrics = total(GATED, rows)
    near(found, [0.5, 0.7, 9.9, 0.4])
    assert metrics["composition/open/a"] == 0.5
    assert metrics["composition/open/b"] == 0.25


def test_with_all_gates_open_it_is_the_sum():
    rows = {"a": [0.9, 0.8], "b": [0.5, 0.6], "c": [0.1, 0.7]}
    near(total(GATED, rows)[0], [1.5, 2.1])


@settings(max_examples=50)
@given(st.floats(-5, 0.5), st.floats(-5, 5), st.floats(-5, 5))
def test_behind_a_closed_gate_nothing_is_earned(a, b, c):
    near(total(GATED, {"a": [a, a], "b": [0.0, b], "c": [0.0, c]})[0], [a, a])


def test_a_missing_reward_matters_only_behind_an_open_gate():
    rows = {"a": [0.4, 0.6, NAN], "b": [NAN, NAN, 1.0], "c": [0.0, 0.0, 0.0]}
    near(total(GATED, rows)[0], [0.4, NAN, NAN])


def test_gates_need_an_order_and_thresholds_of_all_rewards():
    with pytest.raises(ValueError, match=r"composition.order must name each"):
        total(Gated(("a",), {}), {"a": [1.0], "b": [1.0]})
    with pytest.raises(ValueError, match=r"composition.above must name each"):
        total(Gated(("a", "b"), {}), {"a": [1.0], "b": [1.0]})


# log sigmoid of a reference


@pytest.fixture
def references(tmp_path):
    path = tmp_path / "references.json"
    path.write_text(json.dumps({"references": {"0": {"a": 1.0, "b": -1.0}}}))
    return str(path)


def test_the_log_sigmoid_of_2_0_and_minus_2():
    found = log_sigmoid_centered(torch.tensor([5.0, 3.0, 1.0]).double(), torch.tensor(3.0))
    near(found, [-0.126928, -0.693147, -2.126928])


def test_balance_beats_excess_where_the_plain_sums_are_equal(references):
    rows = {"a": [2.0, 5.0], "b": [0.0, -3.0]}  # (1, 1) and (4, -2) above the reference
    near(total(LogSigmoid(references), rows)[0], [-0.626523, -2.145078])


def test_one_reward_keeps_its_ranking_and_the_reference_its_place(references, tmp_path):
    values = [-3.0, 0.0, 1.0, 4.0]
    found = total(LogSigmoid(references), {"a": values})[0]
    assert (found.diff() > 0).all()
    assert (found <= 0).all()
    shifted = tmp_path / "shifted.json"
    shifted.write_text(json.dumps({"references": {"0": {"a": 11.0}}}))
    near(total(LogSigmoid(str(shifted)), {"a": [v + 10 for v in values]})[0], found.tolist())


def test_a_term_is_bounded_and_a_temperature_scales_it(references):
    near(total(LogSigmoid(references, floor=-3.0), {"a": [-100.0]})[0], [-3.0])
    near(total(LogSigmoid(references, {"a": 2.0}), {"a": [5.0]})[0], [-0.126928])


def test_references_that_are_not_there_are_said_before_the_run(references, tmp_path):
    with pytest.raises(ValueError, match=r"no file.*mmalign evaluate"):
        LogSigmoid(str(tmp_path / "none.json")).build({"a": {0: 1.0}})
    with pytest.raises(ValueError, match="no reference of c for '0'"):
        LogSigmoid(references).build({"a": {0: 1.0}, "c": {0: 1.0}})
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    with pytest.raises(ValueError, match="holds no references"):
        LogSigmoid(str(broken)).build({"a": {0: 1.0}})


# Lexicographic


def test_without_margins_the_order_is_lexicographic():
    rows = {"a": [1.0, 1.0, 2.0, 0.0], "b": [5.0, 6.0, 0.0, 9.0]}
    found, metrics = total(Ordered(("a", "b")), rows)
    near(found, [-1 / 3, 1 / 3, 1.0, -1.0])
    assert metrics["composition/decided/a"] == pytest.approx(5 / 6)
    assert metrics["composition/decided/b"] == pytest.approx(1 / 6)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=6),
    st.floats(0.1, 50),
    st.floats(0, 1),
)
def test_comparisons_are_antisymmetric_and_blind_to_the_scale_of_a_reward(rows, scale, margin):
    values = torch.tensor(rows, dtype=torch.float64).T[:, :, None]
    ok = torch.ones_like(values, dtype=torch.bool)
    limits = margin * values.std((1, 2), correction=0)
    wins = duel(values, ok, limits)[0]
    assert torch.equal(wins, -wins.transpose(0, 1))
    flat = {"a": [r[0] for r in rows], "b": [r[1] for r in rows]}
    scaled = {"a": [float(8 * r) for r in flat["a"]], "b": flat["b"]}
    as_floats = {name: [float(v) for v in column] for name, column in flat.items()}
    rule = Ordered(("a", "b"), {"a": 0.5})
    near(total(rule, scaled)[0], total(rule, as_floats)[0].tolist())


def test_each_reward_has_a_margin_of_its_own_and_equal_ones_are_passed_on():
    rows = {"a": [0.0, 1.0, 10.0, 11.0], "b": [2.0, 1.0, 1.0, 1.0]}
    # The deviation of a is 5.02, so that differences of 1 are ties by it and of 10 are not.
    near(total(Ordered(("a", "b"), {"a": 0.5}), rows)[0], [-1 / 3, -1.0, 2 / 3, 2 / 3])
    flat = {"a": [3.0, 3.0], "b": [0.0, 1.0]}
    near(total(Ordered(("a", "b"), {"a": 0.5}), flat)[0], [-1.0, 1.0])


def test_margins_can_go_round_in_a_circle():
    values = torch.tensor([[0.0, 0.6, 1.2], [0.0, 2.0, 4.0]], dtype=torch.float64)[:, :, None]
    wins = duel(
        torch.stack([values[0], -values[1]]), torch.ones(2, 3, 1, dtype=torch.bool), torch.tensor([1.0, 0.0])
    )[0]
    assert wins[0, 1, 0] == wins[1, 2, 0] == wins[2, 0, 0] == 1


def test_a_pair_without_the_verdict_that_would_decide_is_not_counted():
    rows = {"a": [1.0, NAN, 0.0], "b": [0.0, 1.0, 5.0]}
    near(total(Ordered(("a", "b")), rows)[0], [1.0, NAN, -1.0])


# Limits


def constrained(limits, **more):
    return Constrained(limits, **more).build({"r": {0: 1.0}, **{name: {0: 1.0} for name in limits}})


def play(composer, iterations, softness=0.3):
    """A policy of two arms: one pays 1 and breaks the rule, the other pays 0 and keeps it.

    It plays the softmax of what the composition pays; gives the share of the first arm.
    """
    pay, share, prompts = 0.0, 0.5, names(1, 100)
    for _ in range(iterations):
        share = 1 / (1 + math.exp(-pay / softness))
        taken = min(99, max(1, round(100 * share)))
        arms = [1.0] * taken + [0.0] * (100 - taken)
        composed = composer(
            [signal("r", arms), signal("c", [1 - a for a in arms])], Outcome(prompts, []), Peers(prompts), 0
        )
        values = composed.signals[-1].values.flatten()
        pay = float(values[0] - values[-1])
        composer.close()
    return share


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_binding_limit_is_met(rate):
    assert play(constrained({"c": Limit(rate, below=0.5)}), 200) == pytest.approx(rate, abs=0.02)


def test_a_slack_limit_is_forgotten():
    composer = constrained({"c": Limit(0.98, below=0.5)}, step=2.0, keep=0.0)
    assert play(composer, 400) > 0.95
    assert composer.rule.multipliers()[1]["c"] < 0.01


def test_a_limit_that_cannot_be_held_saturates_and_says_so():
    composer = constrained({"c": Limit(0.1, below=0.5)}, step=2.0)
    with pytest.warns(RuntimeWarning, match=r"cannot be held.*99%.*10%"):
        play(composer, 20, softness=-1e-3)  # a policy that seeks what is punished
    assert composer.rule.z["c"] == 6.0
    first, others = composer.rule.multipliers()
    assert first + others["c"] == pytest.approx(1)


def test_without_limits_the_total_is_the_weighted_sum():
    near(total(Constrained(), {"a": [1.0, 2.0], "b": [3.0, -1.0]}, {"b": 0.5})[0], [2.5, 1.5])


def test_the_allowed_rate_is_a_constant_that_no_advantage_sees():
    rows = {"r": [1.0, 0.5, 0.0], "c": [0.0, 1.0, 1.0]}
    found = [advantage(Constrained({"c": Limit(r, below=0.5)}), rows, 1).values for r in (0.0, 0.5)]
    assert_close(*found, atol=1e-5, rtol=0)


def test_multipliers_go_on_where_a_checkpoint_left_them():
    one, other = (constrained({"c": Limit(0.1, below=0.5)}) for _ in range(2))
    play(one, 5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.rule.z["c"] != 0
    assert play(one, 7) == play(other, 7)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    "given", [{"rate": 0.1}, {"rate": 0.1, "below": 1.0, "above": 2.0}, {"rate": 1.0, "below": 0.0}]
)
def test_a_limit_has_one_side_and_a_rate(given):
    with pytest.raises(ValueError, match=r"below and above|rate"):
        Limit(**given)


# All of them


def test_units_count_by_their_mean_and_completions_one_by_one():
    prompts = names(1, 2)
    composer = Product("p").build({"p": {0: 1.0}, "f": {0: 1.0}})
    units = RewardSignal("p", torch.tensor([[1.0, 3.0], [2.0, NAN], [4.0, 4.0], [0.0, 2.0]]), Unit.CRITERION)
    factor = RewardSignal("f", torch.tensor([[0.5], [1.0], [1.0], [0.0]]))
    composed = composer([units, factor], Outcome(prompts, [], views=2), Peers(prompts), 0)
    assert composed.signals[-1].values.flatten().tolist() == [1.0, 2.0, 4.0, 0.0]


def test_a_watched_reward_takes_no_part():
    composer = Product("p").build({"p": {0: 1.0}, "f": {0: 1.0}, "w": {0: 0.0}})
    prompts = names(1, 1)
    rows = [signal("p", [2.0]), signal("f", [0.5]), signal("w", [-7.0])]
    composed = composer(rows, Outcome(prompts, []), Peers(prompts), 0)
    assert composed.signals[-1].values.item() == 1.0
    assert [s.name for s in composed.signals] == ["p", "f", "w", TOTAL]


def test_the_name_of_the_total_is_taken():
    with pytest.raises(ValueError, match="no reward may be named 'total'"):
        Constrained().build({TOTAL: {0: 1.0}})


def test_the_table_names_every_composition():
    assert all(hasattr(kind, "build") for kind in COMPOSITIONS.values())
    assert set(COMPOSITIONS) == {
        "weighted_sum", "gdpo", "marble", "product", "gated", "log_sigmoid", "ordered", "constrained"
    }  # fmt: skip
