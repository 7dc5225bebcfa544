"""The denoising loop: what a group shares, what is recorded, what it costs, and that replay agrees."""

import contextlib
import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from toys import initial

from mmalign.contracts import LoraSettings
from mmalign.pipelines.flow import FlowPolicy, pooled
from mmalign.records import Masks, Pick, Plan, Spans, Steps, Whole
from mmalign.rollout import state_ids
from mmalign.sde import Noise, euler
from mmalign.testing import check_policy, prompts_of

KEY = (0, "test", 3)
TEXTS = ["a red cat", "two blue dogs on the left"]
WINDOW = Plan(6, (1, 2, 3))
SHARED = dataclasses.replace(WINDOW, share_noise=True)
SINGULAR = Plan(5, (0, 2), True, (1, 2), starts=2, singular=True)
TREE = Plan(4, (0, 1, 2), True, splits=(0, 2), correlation=1 / 17, learned=(1, 2))
VALUES = Plan(4, (0, 1, 2), levels=(0.5, 0.7, 0.9), values=True)


def everything(trajectory) -> Pick:
    row, column = trajectory.mask.nonzero(as_tuple=True)
    return Pick(row, column)


def count_rows(policy, rows: list) -> None:
    """Note the batch size of every call of the network."""

    def note(_, __, named):
        rows.append(len(named["timestep"]))

    policy.module.register_forward_pre_hook(note, with_kwargs=True)


def stir(policy, scale=0.1) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=draw))


@pytest.mark.parametrize(
    ("plan", "noise", "more"),
    [
        (WINDOW, Noise(), {}),
        (SHARED, Noise("dance", 0.3), {"guidance": 3.0, "negative_prompt": "a dog"}),
        (Plan(6, (0, 2), True, (1, 2)), Noise("cps", 0.8), {"lora": LoraSettings(0)}),
        (Plan(5, (0, 1, 2, 3)), Noise("cps", 0.8, density="unscaled"), {"gradient_checkpointing": True}),
        (SHARED, Noise("flow", 0.7, reduction="mean"), {"split": "places", "height": 16, "width": 24}),
        (Plan(4), Noise(), {}),
        (SINGULAR, Noise(), {"guidance": 2.0}),
        (TREE, Noise("dance", 0.3), {}),
        (VALUES, Noise(), {}),
        (Plan(5, (1, 3), True, noisy=(0, 2)), Noise("precise", 0.7), {}),
        (Plan(7, (1, 2), True, tail=2), Noise("sage", 0.7), {"guidance": 2.0}),
    ],
    ids=[
        *("window", "shared, guided", "completions, full", "all steps", "by site", "no action"),
        *("singular", "tree", "values", "part of the noise", "second order"),
    ],
)
def test_the_policy_keeps_its_contract(make, prompts, plan, noise, more):
    check_policy(make(noise, **more), prompts, plan)


class Restless(FlowPolicy):
    def sample(self, prompts, plan, key):
        return super().sample(prompts, plan, (*key, torch.randint(2**40, ()).item()))


class Crowded(FlowPolicy):
    def sample(self, prompts, plan, key):
        return super().sample(prompts, plan, (*key, len(prompts)))


class Lonely(FlowPolicy):
    def sample(self, prompts, plan, key):
        return super().sample(prompts, dataclasses.replace(plan, share_noise=False), key)


class Forgetful(FlowPolicy):
    def evaluate(self, trajectory, pick):
        now = super().evaluate(trajectory, pick)
        return dataclasses.replace(now, log_prob=now.log_prob + 1e-3)


class Wasteful(FlowPolicy):
    def picks(self, trajectory, rows, size):
        yield from super().picks(trajectory, rows, size)
        yield from super().picks(trajectory, rows, size)


class Deaf(FlowPolicy):
    def evaluate(self, trajectory, pick):
        now, some = super().evaluate(trajectory, pick), next(iter(self.copies._live))
        return dataclasses.replace(now, log_prob=now.log_prob.detach() + 0 * some.sum())


class Mute(FlowPolicy):
    def locate(self, where, trajectory):
        raise TypeError(f"cannot place {type(where).__name__}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Restless, "equal keys gave other samples"),
        (Crowded, "a sample depends on its batch"),
        (Lonely, "with share_noise=True members of group 0 are different"),
        (Forgetful, "an unchanged policy finds its own actions off by 1.0e-03"),
        (Wasteful, "every unmasked action exactly once"),
        (Deaf, "the log-probability has no gradient"),
        (Mute, "the policy can place nothing"),
    ],
)
def test_a_broken_policy_is_told_what_is_wrong(make, kind, message):
    with pytest.raises(AssertionError, match=message):
        check_policy(make(kind=kind), prompts_of(TEXTS, 2), Plan(3, (0, 1)))


class Unrelated(FlowPolicy):
    def sample(self, prompts, plan, key):
        return super().sample(prompts, dataclasses.replace(plan, share_noise=False, splits=()), key)


class Spendthrift(FlowPolicy):
    def sample(self, prompts, plan, key):
        self.forwards.sample += 1
        return super().sample(prompts, plan, key)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unrelated, "members that share the action at step 0 have different log-probabilities of it"),
        (Spendthrift, "sampling took 19 network rows, the plan 18, or twice that"),
    ],
)
def test_a_policy_that_grows_another_tree_is_told_what_is_wrong(make, kind, message):
    with pytest.raises(AssertionError, match=message):
        check_policy(make(kind=kind), prompts_of(TEXTS, 4), TREE)


def test_the_check_leaves_the_policy_as_it_was(make):
    policy = make()
    before = [p.detach().clone() for p in policy.module.parameters()]
    check_policy(policy, prompts_of(TEXTS, 2), Plan(3, (0, 1)))
    assert all(map(torch.equal, policy.module.parameters(), before))
    assert not policy.copies.state_dict()


# ---- replay


@pytest.mark.parametrize("plan", [WINDOW, SHARED], ids=["independent", "shared"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_ratio_is_one_before_the_first_update(make, prompts, plan, guidance, size):
    policy = make(guidance=guidance)
    stir(policy)
    trajectory = policy.sample(prompts, plan, KEY)
    for pick in policy.picks(trajectory, torch.arange(len(prompts)), size):
        now = policy.evaluate(trajectory, pick)
        ratio = (now.log_prob - trajectory.log_prob[pick.rows, pick.columns]).exp()
        assert (ratio - 1).abs().max() <= 1e-6


def test_text_is_pooled_where_it_speaks():
    """Tokens by the mean of those under the mask; each part by itself has mean 0 and deviation 1."""
    tokens = torch.tensor([[1.0, 3.0], [3.0, 9.0], [9.0, -9.0]])
    condition = {
        "embeds": tokens,
        "mask": torch.tensor([1.0, 1.0, 0.0]),
        "pooled": torch.tensor([5.0, 1.0, 3.0]),
        "places": torch.arange(3),
    }
    third = (3 / 2) ** 0.5
    assert_close(pooled(condition), torch.tensor([-1, 1, third, -third, 0.0]), atol=1e-4, rtol=0)
    del condition["mask"]  # the means are then 13/3 and 1
    assert_close(pooled(condition)[:2], torch.tensor([1.0, -1.0]), atol=1e-4, rtol=0)


def test_states_are_what_actions_were_taken_in(shared_policy, prompts):
    plan = Plan(3, (0, 1))
    trajectory = shared_policy.sample(prompts, plan, (0, "test"))
    pick = Pick(torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0]))
    found = shared_policy.states(trajectory, pick)
    assert torch.equal(found.x, trajectory.replay["x"][[1, 0, 1], [1, 0, 0]])
    assert torch.equal(found.sigma, trajectory.sigmas[[1, 0, 0]])
    texts = torch.stack([pooled(shared_policy.adapter.encode(prompts.text[i])) for i in (1, 0, 1)])
    assert_close(found.text, texts)


def test_what_is_recorded_is_the_transition_that_was_taken(shared_policy, prompts):
    trajectory = shared_policy.sample(prompts, Plan(6, (1, 2, 4)), KEY)
    replay, now = trajectory.replay, shared_policy.evaluate(trajectory, everything(trajectory))
    assert torch.equal(replay["x_next"][:, 0], replay["x"][:, 1])  # step 1 leads to step 2
    assert not torch.equal(replay["x_next"][:, 1], replay["x"][:, 2])  # between 2 and 4 lies an ODE step
    assert replay["x"].shape == (6, 3, 4, 8, 8)
    sigmas = shared_policy._schedule(6)
    assert torch.equal(replay["sigma"][0], sigmas[[1, 2, 4]])
    assert torch.equal(replay["sigma_next"][0], sigmas[[2, 3, 5]])
    normal = torch.distributions.Normal(now.mean, now.std.expand_as(now.mean))
    naive = normal.log_prob(replay["x_next"].flatten(0, 1)).mean((1, 2, 3))
    assert_close(naive.reshape(6, 3), trajectory.log_prob, atol=1e-6, rtol=0)
    z = (replay["x_next"].flatten(0, 1) - now.mean) / now.std
    assert z.mean().abs() < 0.05
    assert abs(z.std() - 1) < 0.05
    assert_close(now.step.flatten().reshape(6, 3)[0], -(sigmas.diff()[[1, 2, 4]]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), shared=st.booleans(), size=st.integers(1, 9))
def test_picks_hold_every_action_once_and_never_part_a_state(shared_policy, data, shared, size):
    trajectory = _small(shared_policy, shared)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=18, max_size=18))).reshape(6, 3)
    trajectory = dataclasses.replace(trajectory, mask=mask)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 5), unique=True, min_size=1)))
    picks = list(shared_policy.picks(trajectory, rows, size))
    found = [(int(r), int(c)) for pick in picks for r, c in zip(pick.rows, pick.columns, strict=True)]
    assert sorted(found) == [(r, c) for r in sorted(rows.tolist()) for c in range(3) if mask[r, c]]
    states = [set(trajectory.replay["state"][pick.rows, pick.columns].tolist()) for pick in picks]
    assert sum(map(len, states)) == len(set().union(*states))
    assert all(len(s) == size for s in states[:-1])
    assert all(0 < len(s) <= size for s in states)
    turned = [p.rows.tolist() for p in shared_policy.picks(trajectory, rows.flip(0), size)]
    assert [sorted(rows) for rows in turned] == [sorted(pick.rows.tolist()) for pick in picks]


_TRAJECTORIES = {}


def _small(policy, shared):
    if shared not in _TRAJECTORIES:
        plan = Plan(6, (1, 2, 3), share_noise=shared)
        _TRAJECTORIES[shared] = policy.sample(prompts_of(TEXTS, 3), plan, KEY)
    return _TRAJECTORIES[shared]


STATE = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**20 - 1), st.integers(0, 4095))


@given(a=STATE, b=STATE, near=st.booleans())
def test_states_are_equal_exactly_if_they_are_one(a, b, near):
    if near:
        b = (a[0], b[1], a[2])
    ids = [state_ids(torch.tensor([g]), torch.tensor([m]), s).item() for g, m, s in (a, b)]
    assert (ids[0] == ids[1]) == (a == b)


def test_group_numbers_that_do_not_fit_a_state_are_refused():
    with pytest.raises(ValueError, match=r"group numbers must lie in 0\.\.2\^31 - 1"):
        state_ids(torch.tensor([2**31]), torch.tensor([0]), 0)


# ---- what a group shares


@pytest.mark.parametrize(
    ("plan", "shared"),
    [(SHARED, 2 * (1 + 3 * 2)), (SINGULAR, 2 * 2 * 2), (TREE, 2 * (2 + 2))],
    ids=["window", "singular", "tree"],
)
def test_the_gradient_of_a_shared_forward_is_the_sum_over_members(make, prompts, plan, shared):
    policy = make()
    stir(policy)
    trajectory = policy.sample(prompts, plan, KEY)
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in policy.module.parameters() if p.requires_grad]

    def gradient(picks):
        policy.module.zero_grad()
        for pick in picks:
            now = policy.evaluate(trajectory, pick)
            (now.log_prob.exp() * weight[pick.rows, pick.columns]).sum().backward()
        return [p.grad.clone() for p in parameters]

    together = gradient(policy.picks(trajectory, torch.arange(6), 100))
    used = policy.forwards.train
    every = everything(trajectory)
    alone = gradient(Pick(r[None], c[None]) for r, c in zip(every.rows, every.columns, strict=True))
    assert (used, policy.forwards.train - used) == (shared, len(every))
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_members_part_at_the_first_action(shared_policy, prompts):
    replay = shared_policy.sample(prompts, SHARED, KEY).replay
    x, x_next = replay["x"], replay["x_next"]
    for group in (slice(0, 3), slice(3, 6)):
        assert torch.equal(x[group, 0], x[group.start, 0].expand(3, -1, -1, -1))
        assert len(x_next[group, 0].flatten(1).unique(dim=0)) == 3
        assert replay["state"][group, 0].unique().numel() == 1
        assert replay["state"][group, 1:].unique().numel() == 6
    assert not torch.equal(x[0, 0], x[3, 0])


def test_a_shared_start_and_independent_ones_follow_the_same_law_of_steps(shared_policy):
    """A group of one is the same whether it shares or not."""
    prompts = prompts_of(TEXTS, 1)
    alone, shared = (shared_policy.sample(prompts, plan, KEY) for plan in (WINDOW, SHARED))
    assert torch.equal(alone.log_prob, shared.log_prob)
    assert torch.equal(alone.outcome.media, shared.outcome.media)


@pytest.mark.parametrize("plan", [WINDOW, SHARED, Plan(4, share_noise=True)], ids=["own", "shared", "ode"])
def test_a_sample_does_not_depend_on_its_batch_or_rank(make, prompts, plan):
    policy = make(guidance=2.0)
    whole = policy.sample(prompts, plan, KEY)
    for rows in ([0], [4, 1], [5, 3, 2, 0], [1, 1]):
        part = policy.sample(prompts.take(torch.tensor(rows)), plan, KEY)
        assert_close(part.outcome.media, whole.outcome.media[rows], atol=1e-5, rtol=0)
        assert_close(part.log_prob, whole.log_prob[rows], atol=1e-6, rtol=0)
        for name in part.replay:
            assert_close(part.replay[name], whole.replay[name][rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_sample_does_not_depend_on_the_chunk(make, prompts, chunk):
    for plan in (WINDOW, dataclasses.replace(SHARED, strides=(1, 2))):
        whole, cut = (make(guidance=2.0, chunk=c).sample(prompts, plan, KEY) for c in (64, chunk))
        assert_close(cut.outcome.media, whole.outcome.media, atol=1e-5, rtol=0)


def test_forwards_are_cut_at_the_chunk(make, prompts):
    policy, rows = make(guidance=2.0, chunk=5), []
    count_rows(policy, rows)
    policy.sample(prompts, Plan(3), KEY)
    assert rows == [4, 4, 4] * 3
    assert policy.forwards.sample == sum(rows)


def test_a_group_of_two_prompts_cannot_share_its_noise(shared_policy, prompts):
    mixed = dataclasses.replace(prompts, group=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="group 0 shares its noise but not its prompt: 'a red cat' and"):
        shared_policy.sample(mixed, SHARED, KEY)


# ---- what it costs


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sde_steps", [(0,), (0, 1, 2, 3, 4), (2, 3), (1, 4)])
def test_forwards_are_those_of_the_formula(make, prompts, guidance, sde_steps):
    groups, members, steps, actions, first = 2, 3, 6, len(sde_steps), sde_steps[0]
    rows = 2 if guidance > 1 else 1
    for shared in (False, True):
        policy = make(guidance=guidance)
        trajectory = policy.sample(prompts, Plan(steps, sde_steps, shared), KEY)
        for pick in policy.picks(trajectory, torch.arange(6), 4):
            policy.evaluate(trajectory, pick)
        with torch.no_grad():
            policy.evaluate(trajectory, everything(trajectory))
        if shared:
            sample = groups * (first + 1 + members * (steps - first - 1))
            train = groups * (1 + members * (actions - 1))
        else:
            sample, train = groups * members * steps, groups * members * actions
        assert dataclasses.astuple(policy.forwards) == (rows * sample, rows * train, rows * train)


def test_the_network_sees_as_many_rows_as_are_counted(make, prompts):
    policy, rows = make(guidance=2.0), []
    count_rows(policy, rows)
    trajectory = policy.sample(prompts, dataclasses.replace(SHARED, strides=(1, 2)), KEY)
    policy.evaluate(trajectory, everything(trajectory))
    policy.images(prompts, 3, KEY)
    assert sum(rows) == sum(dataclasses.astuple(policy.forwards))


def test_each_prompt_is_encoded_once(make, prompts):
    policy, calls = make(guidance=2.0, negative_prompt="a dog"), []
    policy.adapter.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    trajectory = policy.sample(prompts, SHARED, KEY)
    policy.sample(prompts, WINDOW, KEY)
    policy.evaluate(trajectory, everything(trajectory))
    assert len(calls) == 3  # two prompts and the negative one


def test_forgotten_prompts_are_encoded_again(make, prompts):
    policy, calls = make(guidance=2.0), []
    policy.cached_texts = 2  # of three: two prompts and the negative one
    policy.adapter.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first, again = policy.sample(prompts, WINDOW, KEY), policy.sample(prompts, WINDOW, KEY)
    assert torch.equal(first.outcome.media, again.outcome.media)
    assert len(calls) > 3
    assert len(policy._cache) == 2


# ---- completions


def test_every_completion_is_the_one_of_its_stride_alone(make, prompts):
    policy = make()
    plan = Plan(7, (1, 2), strides=(1, 2, 3))
    together = policy.sample(prompts, plan, KEY)
    assert together.outcome.views == 3
    # Three steps to the last action, two forwards from there for all strides, then 2, 1 and 0 of their own.
    assert policy.forwards.sample == 6 * (3 + 2 + 2 + 1 + 0)
    for i, stride in enumerate(plan.strides):
        alone = policy.sample(prompts, dataclasses.replace(plan, strides=(stride,)), KEY)
        assert_close(together.outcome.media[i::3], alone.outcome.media, atol=1e-5, rtol=0)
        assert torch.equal(together.log_prob, alone.log_prob)


def test_noise_that_is_no_action_is_drawn_all_the_same(make, prompts):
    policy = make(Noise("dance", 0.5))
    every = policy.sample(prompts, Plan(6, (0, 1, 2, 3, 4), True), KEY)
    some = policy.sample(prompts, Plan(6, (1, 3), True, noisy=(0, 2, 4)), KEY)
    assert torch.equal(some.outcome.media, every.outcome.media)
    assert torch.equal(some.log_prob, every.log_prob[:, [1, 3]])
    for name in ("x", "x_next", "mean", "sigma", "sigma_next"):
        assert torch.equal(some.replay[name], every.replay[name][:, [1, 3]])
    assert len(some.replay["state"].unique()) == 6 * 2  # members parted before the first action


@pytest.mark.parametrize("shared", [True, False])
def test_steps_of_second_order_go_on_from_the_last_estimate_of_the_window(make, prompts, shared):
    policy = make(guidance=2.0)
    stir(policy)
    trajectory = policy.sample(prompts, Plan(8, (1, 2), shared, tail=3), KEY)
    groups, members = 2, 3
    first = groups * 2 + groups * members if shared else groups * members * 3
    assert policy.forwards.sample == 2 * (first + groups * members * 3)
    last = Pick(torch.arange(6), torch.ones(6, dtype=torch.int64))
    with torch.no_grad():
        now = policy.evaluate(trajectory, last)
    sigmas = policy._schedule(8)
    before = (sigmas[2], trajectory.replay["x"][:, 1] - sigmas[2] * now.velocity)
    x, texts = trajectory.replay["x_next"][:, 1], policy._texts(prompts.text, 2.0)
    grid = torch.tensor([sigmas[3], sigmas[4].lerp(sigmas[5], 2 / 3), sigmas[6].lerp(sigmas[7], 1 / 3), 0.0])
    for t, u in pairwise(grid):
        v = policy._velocity(x, t.expand(6), texts, 2.0)
        clean = x - t * v
        if u > 0:
            h, h_before = (((1 - b) / b).log() - ((1 - a) / a).log() for a, b in ((t, u), (before[0], t)))
            guess = clean + (clean - before[1]) * h / (2 * h_before)
        else:
            guess = clean
        x, before = u / t * x + (1 - u / t) * guess, (t, clean)
    assert_close(policy._decode(x), trajectory.outcome.media, atol=1e-5, rtol=0)


def test_a_tail_of_one_step_ends_at_the_clean_estimate_and_a_tail_from_noise_begins_as_euler(make, prompts):
    policy = make()
    stir(policy)
    found = policy.sample(prompts, Plan(6, (0, 1), tail=1), KEY)
    x, sigma = found.replay["x_next"][:, 1], policy._schedule(6)[2]
    velocity = policy._velocity(x, sigma.expand(6), policy._texts(prompts.text, 1.0), 1.0)
    assert_close(found.outcome.media, policy._decode(x - sigma * velocity), atol=1e-5, rtol=0)
    two = policy.sample(prompts, Plan(2, tail=2), KEY).outcome.media
    assert_close(two, policy.images(prompts, 2, KEY))  # Euler, then the last step


def test_what_was_drawn_is_told_with_the_mean_that_it_was_drawn_around(make, prompts):
    policy = make()
    stir(policy)
    trajectory = policy.sample(prompts, SHARED, KEY)
    pick = everything(trajectory)
    now = policy.evaluate(trajectory, pick)
    assert_close(now.drawn.mean, now.mean, atol=1e-6, rtol=0)
    assert torch.equal(now.drawn.x_next, trajectory.replay["x_next"].flatten(0, 1))
    stir(policy)
    later = policy.evaluate(trajectory, pick)
    assert torch.equal(later.drawn.mean, now.drawn.mean)
    moved = -later.slope * (later.velocity - now.velocity)
    assert_close(later.mean - now.mean, moved, atol=1e-5, rtol=0)


def test_images_are_what_the_plan_without_actions_samples(make, prompts):
    policy = make(guidance=3.0)
    assert torch.equal(policy.images(prompts, 5, KEY), policy.sample(prompts, Plan(5), KEY).outcome.media)
    off = make().images(prompts, 5, KEY)
    assert torch.equal(policy.images(prompts, 5, KEY, guidance=1.0), off)
    assert not torch.equal(policy.images(prompts, 5, KEY), off)


def test_the_base_model_can_take_the_last_steps(make, prompts):
    policy = make(guidance=2.0)
    base = policy.images(prompts, 5, KEY)
    stir(policy)
    tuned = policy.images(prompts, 5, KEY)
    assert torch.equal(policy.images(prompts, 5, KEY, tuned=1.0), tuned)
    assert torch.equal(policy.images(prompts, 5, KEY, tuned=0.0), base)
    mixed = policy.images(prompts, 5, KEY, tuned=0.6)  # three steps and two
    assert not torch.equal(mixed, tuned)
    assert not torch.equal(mixed, base)
    x, texts, sigmas = (
        initial(prompts, policy.shape, KEY),
        policy._texts(prompts.text, 2.0),
        policy._schedule(5),
    )
    for step in range(5):
        with policy._base() if step >= 3 else contextlib.nullcontext():
            x = euler(x, policy._velocity(x, sigmas[step].expand(6), texts, 2.0), *sigmas[step : step + 2])
    assert_close(policy._decode(x), mixed)
    assert torch.equal(policy.images(prompts, 5, KEY), tuned)  # the adapters are back
    with pytest.raises(ValueError, match=r"tuned below 1 needs the base model"):
        make(lora=LoraSettings(rank=0)).images(prompts, 2, KEY, tuned=0.5)


# ---- parameters


def test_lora_trains_the_attention_and_starts_as_the_base(make, prompts):
    policy, base = make(), make(lora=LoraSettings(rank=0))
    trained = [name for name, p in policy.module.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    layers = {name.split(".attn.")[1].split(".lora")[0] for name in trained}
    assert layers == {
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    }
    assert_close(policy.images(prompts, 4, KEY), base.images(prompts, 4, KEY), atol=0, rtol=0)
    assert all(p.requires_grad for p in base.module.parameters())


def test_lora_weights_are_named_by_their_seed_alone(make):
    def weights(**more):
        torch.rand(())  # whatever the global generator does
        return torch.cat([p.flatten() for p in make(**more).module.parameters() if p.requires_grad])

    first = weights(seed=0)
    assert torch.equal(first, weights(seed=0))
    assert torch.equal(first, weights(seed=0, precision="bf16"))
    assert not torch.equal(first, weights(seed=1))
    a = first[first != 0]
    assert a.std().item() == pytest.approx(1 / 4, rel=0.1)  # 1 / rank


def test_making_a_policy_leaves_the_global_generator_alone(make):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make()
    assert torch.equal(torch.rand(3), expected)


def test_divergence_from_the_reference_is_zero_at_first_and_then_has_a_gradient(make, prompts):
    policy = make()
    policy.copies.save("reference")
    trajectory = policy.sample(prompts, SHARED, KEY)

    def divergence():
        now = policy.evaluate(trajectory, everything(trajectory))
        with torch.no_grad(), policy.copies.use("reference"):
            reference = policy.evaluate(trajectory, everything(trajectory))
        return ((now.mean - reference.mean) ** 2 / (2 * now.std**2)).mean()

    assert divergence() == 0
    stir(policy)
    value = divergence()
    value.backward()
    assert value > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.module.parameters())


def test_checkpointing_does_not_change_the_gradient(make, prompts):
    gradients = []
    for checkpointing in (False, True):
        policy = make(gradient_checkpointing=checkpointing)
        stir(policy)
        trajectory = policy.sample(prompts, WINDOW, KEY)
        policy.evaluate(trajectory, everything(trajectory)).log_prob.sum().backward()
        gradients.append([p.grad for p in policy.module.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-7, rtol=1e-5)


class Wrapped(nn.Module):
    """As DDP does: the network inside, and nothing else of it outside."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *values, **named):
        self.calls += 1
        return self.module(*values, **named)


def test_forwards_run_through_what_the_trainer_wrapped(make, prompts, tmp_path):
    policy = make()
    expected = policy.sample(prompts, WINDOW, KEY).outcome.media
    policy.module = Wrapped(policy.module)
    trajectory = policy.sample(prompts, WINDOW, KEY)
    assert torch.equal(trajectory.outcome.media, expected)
    assert policy.module.calls == 6
    policy.evaluate(trajectory, everything(trajectory))
    assert policy.module.calls == 7
    policy.save(tmp_path)
    policy.load(tmp_path)


# ---- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_half_precision_runs_and_stores_fp32(make, prompts, precision, rank):
    policy = make(precision=precision, lora=LoraSettings(rank, 6), guidance=2.0)
    frozen = {p.dtype for p in policy.module.parameters() if not p.requires_grad}
    assert frozen == ({getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])} if rank else set())
    assert {p.dtype for p in policy.module.parameters() if p.requires_grad} == {torch.float32}
    trajectory = policy.sample(prompts, SHARED, KEY)
    for tensor in (trajectory.log_prob, trajectory.outcome.media, *trajectory.replay.values()):
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.isfinite(tensor).all()
    now = policy.evaluate(trajectory, everything(trajectory))
    now.log_prob.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.module.parameters() if p.grad is not None)
    assert (now.log_prob - trajectory.log_prob.flatten()).abs().max() < 1e-3
    exact = make(lora=LoraSettings(rank, 6), guidance=2.0).sample(prompts, SHARED, KEY)
    assert (trajectory.outcome.media - exact.outcome.media).abs().max() < 0.1
    check_policy(policy, prompts, SHARED, tolerance=1e-3)


# ---- places


def test_places_are_steps_and_whole(shared_policy, prompts):
    trajectory = shared_policy.sample(prompts, WINDOW, KEY)
    assert torch.equal(shared_policy.locate(Whole(), trajectory), torch.ones(1, 1, 1))
    index = torch.tensor([[0, 2]]).expand(6, 2)
    footprint = shared_policy.locate(Steps(index), trajectory)
    assert torch.equal(footprint[0], torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    assert footprint.shape == (6, 2, 3)


def test_what_cannot_be_placed_is_named(shared_policy, prompts):
    trajectory = shared_policy.sample(prompts, WINDOW, KEY)
    spans = Spans(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="flow policy cannot place Spans on its denoising steps"):
        shared_policy.locate(spans, trajectory)
    with pytest.raises(TypeError, match=r"cannot place Masks .* where they are split, Masks"):
        shared_policy.locate(Masks(torch.ones(6, 1, 1, 8, 8)), trajectory)


def test_masks_lie_on_the_latent_by_area(make, prompts):
    policy = make(split="places", height=16, width=24)
    trajectory = policy.sample(prompts, WINDOW, KEY)
    assert trajectory.log_prob.shape == (6, 3, 4, 6)
    mask = torch.zeros(6, 2, 1, 16, 24)
    mask[:, 0, 0, :6, :4] = 1  # one and a half rows of one column of 4x4 pixel cells
    mask[:, 1] = 1
    footprint = policy.locate(Masks(mask), trajectory)
    assert footprint.shape == (6, 2, 1, 4, 6)
    expected = torch.zeros(4, 6)
    expected[0, 0], expected[1, 0] = 1, 0.5
    assert_close(footprint[0, 0, 0], expected)
    assert_close(footprint[:, 1], torch.ones(6, 1, 4, 6))
    assert policy.locate(Whole(), trajectory).shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="an image has one frame"):
        policy.locate(Masks(torch.ones(6, 1, 2, 16, 24)), trajectory)


def test_log_prob_by_place_is_the_same_log_prob(make, prompts):
    whole, by_site = (make(split=split).sample(prompts, WINDOW, KEY) for split in ("whole", "places"))
    assert torch.equal(whole.outcome.media, by_site.outcome.media)
    assert_close(by_site.log_prob.mean((2, 3)), whole.log_prob)
