"""On-policy distillation (arXiv:2605.08063): the loss, who teaches whom, and where teachers come from."""

import pytest
import torch
from torch.testing import assert_close
from toys import ToyFlow, names
from training import GROUPS, MEMBERS, trainer

from mmalign.algorithms.distill import Distill, Taught
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.data import Prompt, PromptSource
from mmalign.objectives import REFERENCE, divergence
from mmalign.records import Evaluation, Minibatch, Pick, Plan, Prompts
from mmalign.sde import Noise, transition

N = GROUPS * MEMBERS


def stir(policy: ToyFlow, scale: float, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=draw))


def sampled(prompts: Prompts | None = None) -> tuple[ToyFlow, Minibatch]:
    """A policy, and all actions of a sample of it."""
    policy = ToyFlow()
    trajectory = policy.sample(prompts or names(2, 2), Plan(4, (0, 1, 2)), (0,))
    rows = torch.arange(len(trajectory)).repeat_interleave(3)
    pick = Pick(rows, torch.arange(3).repeat(len(trajectory)))
    return policy, Minibatch(
        trajectory, pick, torch.zeros(1, len(pick)), torch.full((len(pick),), 1 / len(pick))
    )


def test_a_teacher_that_is_the_student_has_nothing_to_teach():
    policy, batch = sampled()
    policy.copies.save("twin")
    losses, _ = Taught(("twin",))(policy, batch)
    losses.sum().backward()
    assert losses.item() == 0
    assert all(not p.grad.any() for p in policy.module.parameters() if p.requires_grad)


def test_the_divergence_of_two_steps_is_the_closed_form_in_their_velocities():
    x, v, t, u = torch.randn(1, 2, 2), torch.randn(1, 2, 2), torch.tensor([0.8]), torch.tensor([0.7])
    noise, moved = Noise("flow", 0.7), v + 1.0
    steps = [transition(x[None], w[None], t, u, noise, 0.9) for w in (v, moved)]
    one, other = (
        Evaluation(torch.zeros(1), s.mean, s.std, w[None], s.step)
        for s, w in zip(steps, (v, moved), strict=True)
    )
    g = float(steps[0].g)
    closed = 0.1 / 2 * (g * 0.2 / (2 * 0.8) + 1 / g) ** 2
    assert_close(divergence(one, other).item(), closed, rtol=1e-4, atol=1e-6)
    assert_close(closed, 0.0395414, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_mean():
    policy, batch = sampled()
    stir(policy, 0.1)
    policy.copies.save("teacher")
    stir(policy, 0.1, seed=1)
    losses, _ = Taught(("teacher",))(policy, batch)
    losses.sum().backward()
    found = [p.grad.clone() for p in policy.module.parameters() if p.requires_grad]
    policy.module.zero_grad()
    with torch.no_grad(), policy.copies.use("teacher"):
        goal = policy.evaluate(batch.trajectory, batch.pick).mean
    now = policy.evaluate(batch.trajectory, batch.pick)
    pull = ((now.mean - goal) / now.std**2).detach() / goal[0].numel() / len(batch.pick)
    now.mean.backward(pull)
    for a, p in zip(found, (p for p in policy.module.parameters() if p.requires_grad), strict=True):
        assert_close(a, p.grad, rtol=1e-4, atol=1e-7)


def two() -> Prompts:
    prompts = names(2, 2)
    extra = [{"teacher": "b"} if group else {"teacher": "a"} for group in prompts.group.tolist()]
    return Prompts(prompts.text, prompts.group, prompts.member, extra)


def test_every_prompt_has_the_teacher_that_it_names():
    policy, batch = sampled(two())
    stir(policy, 0.2, seed=1)
    policy.copies.save("a")
    stir(policy, 0.2, seed=2)
    policy.copies.save("b")
    mixed = torch.randperm(len(batch.pick), generator=torch.Generator().manual_seed(0))
    batch = Minibatch(batch.trajectory, batch.pick.take(mixed), batch.advantage, batch.weight)
    before = policy.forwards.reference
    lesson = Taught(("a", "b")).lesson(policy, batch)
    assert policy.forwards.reference - before == len(batch.pick)  # once an action, however many teach
    for name, group in (("a", 0), ("b", 1)):
        with torch.no_grad(), policy.copies.use(name):
            alone = policy.evaluate(batch.trajectory, batch.pick)
        mine = batch.trajectory.group[batch.pick.rows] == group
        assert torch.equal(lesson.mean[mine], alone.mean[mine])
        assert not torch.equal(lesson.mean[~mine], alone.mean[~mine])


def test_a_prompt_without_a_teacher_is_named():
    policy, batch = sampled()
    with pytest.raises(ValueError, match=r"prompt '0' names None as its teacher; .* one of a, b"):
        Taught(("a", "b"))(policy, batch)


@pytest.fixture
def teacher(tmp_path):
    """The folder of a run that was trained by Flow-GRPO."""
    found = trainer(FlowGRPO(steps=5, clip=1e-2, kl=0.0), 25, tmp_path / "teacher", ema_decay=0.0)
    found.run()
    return found, tmp_path / "teacher"


def test_a_student_becomes_its_teacher(teacher, tmp_path):
    taught, folder = teacher
    found = trainer(Distill(steps=5, teachers={"red": str(folder)}), 40, tmp_path / "student")
    live = [p.detach().clone() for p in found.learner.parameters]
    fresh = [p for p in ToyFlow().module.parameters() if p.requires_grad]
    assert all(map(torch.equal, live, fresh))  # reading the teacher leaves the student as it was
    for copy, weight in zip(found.policy.copies.state_dict()["red"], taught.learner.parameters, strict=True):
        assert torch.equal(copy, weight)
    found.run()
    rows = list(found.tracker.metrics.values())
    assert rows[-1]["kl"] < rows[0]["kl"] / 5
    assert rows[-1]["reward/redness"] > rows[0]["reward/redness"] + 0.2
    for copy, weight in zip(found.policy.copies.state_dict()["red"], taught.learner.parameters, strict=True):
        assert torch.equal(copy, weight)  # teachers stay


def test_two_teachers_at_once(teacher, tmp_path):
    folder = str(teacher[1])
    rows = [Prompt(str(i), {"teacher": ("a", "b")[i % 2]}) for i in range(8)]
    method = Distill(steps=5, teachers={"a": folder, "b": folder})
    one, two = (
        trainer(m, 2, prompts=PromptSource(rows, GROUPS, MEMBERS, 0), batch=1000)
        for m in (Distill(steps=5, teachers={"a": folder}), method)
    )
    for found in (one, two):
        found.run()
    for a, b in zip(one.learner.parameters, two.learner.parameters, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_teacher_that_was_never_trained_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*runs/quickstart; .*recipes/quickstart\.yaml"):
        trainer(Distill(steps=5, teachers={"red": str(tmp_path / "runs/quickstart")}))
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="begun is a run without a complete checkpoint"):
        trainer(Distill(steps=5, teachers={"red": str(tmp_path / "begun")}))


def test_forwards_are_those_of_the_formula():
    found = trainer(Distill(steps=6), batch=7)
    found.run()
    counts = found.policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * 6, N * 5, N * 5)


@pytest.mark.parametrize(
    "wrong",
    [{"noise": Noise("flow", 0.0)}, {"teachers": {REFERENCE: "somewhere"}}],
    ids=["noise", "teachers"],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=r"noise\.level must be above 0|cannot be called 'reference'"):
        Distill(**wrong)
