import math
import threading
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from mmalign.contracts import Forwards
from mmalign.data import Prompt
from mmalign.evaluation import (
    Alone,
    Evaluated,
    EvaluationSettings,
    Evaluator,
    Shown,
    Verdict,
    bootstrap,
    diversity,
    gain,
    prompt_means,
    repeat,
    score,
    spread,
    summarize,
    verdicts,
    wording,
)
from mmalign.randomness import generator
from mmalign.records import RewardSignal

NAN = math.nan


class Painter:
    """Draws noise that is named by prompt and seed."""

    def __init__(self, brightness=0.0):
        self.forwards, self.brightness = Forwards(), brightness

    def images(self, prompts, steps, key, guidance=None, tuned=1.0):
        self.forwards.sample += len(prompts) * steps
        names = zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
        drawn = [torch.rand(3, 16, 16, generator=generator(*key, *name)) for name in names]
        return (torch.stack(drawn) + self.brightness).clamp(0, 1)


@dataclass
class Brightness:
    name: str = "bright"

    def __call__(self, outcome):
        values = outcome.media.mean((1, 2, 3))
        details = [
            {"strict": bool(value > 0.5), "soft": float(value), "category": text.split()[-1], "note": "text"}
            for value, text in zip(values, outcome.prompts.text, strict=True)
        ]
        return RewardSignal(self.name, values[:, None], details=details)


PROMPTS = [Prompt(f"{i} {'dog' if i % 2 else 'cat'}") for i in range(5)]
SMALL = EvaluationSettings(prompts=0, seeds=3, steps=2, batch=4, show=2, show_seeds=2)


def test_black_and_white_are_one_apart_and_equal_pictures_nothing():
    images = torch.stack(
        [torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.ones(3, 32, 32), torch.ones(3, 32, 32)]
    )
    assert diversity(images[:2], torch.tensor([0, 0])) == pytest.approx(1.0)
    assert diversity(images[2:], torch.tensor([0, 0])) == 0.0
    assert diversity(images, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)


def test_videos_differ_by_their_frames():
    videos = torch.zeros(2, 4, 3, 8, 8)
    videos[1, 3] = 1  # one frame of four
    assert diversity(videos, torch.tensor([0, 0])) == pytest.approx(0.5)


def test_diversity_looks_inside_prompts_alone():
    assert diversity(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1])) is None


def test_diversity_does_not_see_what_pooling_removes():
    checker = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    images = torch.stack([checker.float().expand(3, -1, -1), 1 - checker.float().expand(3, -1, -1)])
    assert diversity(images, torch.tensor([0, 0])) == pytest.approx(0.0, abs=1e-6)


def test_a_prompt_counts_once_however_many_verdicts_it_has():
    values, group = torch.tensor([1.0, NAN, NAN, 0.0, 0.0, 0.0]), torch.tensor([7, 7, 7, 3, 3, 3])
    assert_close(prompt_means(values, group), torch.tensor([0.0, 1.0], dtype=torch.float64))
    found = score(values, group)
    assert (found.mean, found.prompts, found.images) == (0.5, 2, 4)


def test_a_prompt_without_any_verdict_is_left_out():
    found = score(torch.tensor([0.25, NAN]), torch.tensor([0, 1]))
    assert (found.mean, found.prompts, found.images) == (0.25, 1, 1)
    assert math.isnan(found.low)


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    means = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(means)
    error = float(means.std()) / 20
    assert low == pytest.approx(float(means.mean()) - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(float(means.mean()) + 1.96 * error, abs=0.25 * error)
    assert bootstrap(means) == (low, high)


def test_a_gain_is_compared_prompt_by_prompt():
    base = torch.tensor([0.0, 0.5, 1.0, 0.2])
    group = torch.arange(4)
    images = torch.zeros(4, 3, 8, 8)
    before = summarize([Verdict({"r": float(v)}) for v in base], images, group)
    after = summarize([Verdict({"r": float(v) + 0.125}) for v in base], images, group)
    found = gain(before, after, "r")
    assert found.mean == pytest.approx(0.125)
    assert (found.low, found.high) == (pytest.approx(0.125), pytest.approx(0.125))


def test_texts_differ_by_the_words_that_they_do_not_share():
    group = torch.tensor([0, 0, 0, 1, 1])
    texts = ["a red dog", "A red cat", "a red dog", "same words", "words same"]
    # {a, red, dog} and {a, red, cat} share 2 of 4 words; of the three pairs one is equal.
    assert wording(texts, group) == pytest.approx(((0.5 + 0.0 + 0.5) / 3 + 0.0) / 2)
    assert wording(["", ""], torch.zeros(2)) == 0.0
    assert wording(["a", "b"], torch.tensor([0, 1])) is None


def test_numbers_in_the_details_become_scores_of_their_own():
    prompts = repeat(PROMPTS, [0, 1], 1)
    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)])
    found = verdicts([Brightness()], prompts, images)
    assert [v.values for v in found] == [
        {"bright": 0.25, "strict": 0.0, "soft": 0.25},
        {"bright": 0.75, "strict": 1.0, "soft": 0.75},
    ]
    assert [v.category for v in found] == ["cat", "dog"]


def test_two_rewards_with_the_same_detail_keep_both():
    prompts, images = repeat(PROMPTS, [0], 1), torch.full((1, 3, 4, 4), 0.25)
    found = verdicts([Brightness(), Brightness("other")], prompts, images, batch=1)
    assert set(found[0].values) == {"bright", "strict", "soft", "other", "other.strict", "other.soft"}


def test_a_reward_that_fails_on_a_picture_gives_no_verdict_on_it_and_says_why():
    class Picky(Brightness):
        def __call__(self, outcome):
            if (outcome.media > 0.7).any():
                raise RuntimeError("too bright")
            return super().__call__(outcome)

    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)])
    with pytest.warns(RuntimeWarning, match=r"'bright' .* 1 of 2 samples \(1 x RuntimeError: too bright\)"):
        found = verdicts([Picky()], repeat(PROMPTS, [0, 1], 1), images)
    assert found[0].values["bright"] == 0.25
    assert math.isnan(found[1].values["bright"])


def test_categories_split_the_scores():
    found, _ = Evaluator(PROMPTS, [Brightness()], SMALL, Alone()).scores(Painter())
    assert {kind: s.prompts for kind, s in found.categories["soft"].items()} == {"cat": 3, "dog": 2}
    split = found.categories["soft"]
    assert found.scores["soft"].mean == pytest.approx((3 * split["cat"].mean + 2 * split["dog"].mean) / 5)


def test_the_same_prompts_and_noise_whatever_the_batch():
    def means(batch):
        settings = EvaluationSettings(seeds=3, steps=2, batch=batch)
        return Evaluator(PROMPTS, [Brightness()], settings, Alone()).scores(Painter())[0].by_prompt

    assert means(1) == means(64)


def test_the_grid_shows_the_same_pictures_as_the_scores():
    evaluator, policy = Evaluator(PROMPTS, [Brightness()], SMALL, Alone()), Painter()
    _, shown = evaluator.scores(policy)
    alone = evaluator.grid(policy)
    assert_close(shown.images, alone.images)
    assert shown.captions == alone.captions
    assert shown.prompts == [PROMPTS[0].text, PROMPTS[2].text]
    assert len(shown.images) == 4


def test_forwards_of_evaluation_are_not_counted_as_training():
    policy = Painter()
    found, _ = Evaluator(PROMPTS, [Brightness()], SMALL, Alone()).scores(policy)
    assert policy.forwards.sample == 0
    assert found.forwards == 5 * 3 * 2


class Ranks:
    """Threads that gather as processes would."""

    def __init__(self, world):
        self.world, self.parts, self.barrier = world, [None] * world, threading.Barrier(world)

    def of(self, rank):
        ranks = self

        class Rank:
            world = ranks.world

            def gather_objects(self, items):
                return [item for part in self.exchange(items) for item in part]

            def gather(self, rows):
                return torch.cat(self.exchange(rows))

            def exchange(self, part):
                ranks.parts[rank] = part
                ranks.barrier.wait()
                parts = list(ranks.parts)
                ranks.barrier.wait()
                return parts

        Rank.rank = rank
        return Rank()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_find_what_one_finds(world):
    one, shown = Evaluator(PROMPTS, [Brightness()], SMALL, Alone()).scores(Painter())
    ranks, results = Ranks(world), [None] * world

    def work(rank):
        evaluator = Evaluator(PROMPTS, [Brightness()], SMALL, ranks.of(rank))
        results[rank] = (*evaluator.scores(Painter()), evaluator.grid(Painter()))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, drawn, grid in results:
        assert found.by_prompt == one.by_prompt
        assert found.scores == one.scores
        assert found.diversity == pytest.approx(one.diversity)
        assert_close(drawn.images, shown.images)
        assert_close(grid.images, shown.images)
        assert drawn.captions == grid.captions == shown.captions


def test_scores_survive_the_disk(tmp_path):
    found, shown = Evaluator(PROMPTS, [Brightness()], SMALL, Alone()).scores(Painter())
    found.save(tmp_path / "base.json")
    again = Evaluated.load(tmp_path / "base.json")
    assert again == found
    shown.save(tmp_path / "base.pt")
    assert_close(Shown.load(tmp_path / "base.pt").images, shown.images, atol=0.5 / 255 + 1e-6, rtol=0)


def test_prompts_are_picked_evenly_over_the_file():
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 0) == spread(3, 5) == [0, 1, 2]


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"steps": 0}, {"every": -1}, {"prompts": -1}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationSettings(**wrong)
