"""The adversarial reward: losses by hand, a critic that learns, keeps what it knew, and resumes exactly."""

import json
import math
import re
import shutil
import tarfile
import warnings
import zipfile

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from PIL import Image
from torch.testing import assert_close

from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels import adversarial, load
from mmalign.rewardmodels.adversarial import accuracy, fitted, hinge, logistic, pairwise, tiles
from mmalign.testing import check_reward


def painted(count, dark, seed=0):
    """Gray pictures with noise, [count, 3, 16, 16], below or above middle gray from left to right."""
    random = torch.Generator().manual_seed(seed)
    slope = torch.linspace(0.2, 0.8, 16).flip(0) if dark else torch.linspace(0.2, 0.8, 16)
    return (slope + 0.1 * torch.randn(count, 3, 16, 16, generator=random)).clamp(0, 1)


def outcome_of(media):
    rows = torch.arange(len(media))
    return Outcome(Prompts(["x"] * len(rows), rows // 4, rows % 4, [{}] * len(rows)), media)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    for i, picture in enumerate(painted(40, dark=False, seed=5)):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def made(references):
    def make(**settings):
        return load(
            "adversarial", references=str(references), **{"features": "pixels", "width": 32, **settings}
        )

    return make


def weights(reward):
    return [p.detach().clone() for p in reward.head.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_losses_by_hand():
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge(real, made).item() == pytest.approx((0.25 + 0.5) / 2)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5))) / 4
    expected += (math.log1p(math.exp(-3)) + math.log(2)) / 4
    assert logistic(real, made).item() == pytest.approx(expected)
    likely = [1 / (1 + math.exp(-5)), 1 / (1 + math.exp(-0.5))]
    assert pairwise(real, made).item() == pytest.approx(-sum(map(math.log, likely)) / 2)


def test_hinge_is_zero_beyond_the_margin_and_above_one_for_swapped_labels():
    real, made = torch.tensor([1.0, 4.0]), torch.tensor([-1.0, -2.0])
    assert hinge(real, made) == 0
    assert hinge(made, real) > 1


def test_accuracy_counts_pairs_and_ties_half():
    assert accuracy(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])) == pytest.approx(3.5 / 6)


def test_tiles_are_places_of_the_picture():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :8, 8:16] = 1  # the second of the 4 x 4
    found = tiles(images)
    assert found.shape == (1, 17, 192)
    assert_close(found[0, 2], torch.full((192,), 0.5))
    assert_close(found[0, [1, *range(3, 17)]], torch.full((15, 192), -0.5))


def test_it_holds_the_contract_and_says_nothing_before_its_first_lesson(made):
    reward, outcome = made(), outcome_of(painted(8, dark=True))
    assert torch.equal(reward(outcome).values, torch.zeros(8, 1))
    reward.fit(outcome)
    check_reward(reward, outcome)


@pytest.mark.parametrize("loss", ["hinge", "logistic", "pairwise"])
@pytest.mark.parametrize("local", [0.3, 0.0])
def test_it_learns_to_prefer_what_looks_like_references(made, loss, local):
    reward = made(loss=loss, local=local, patches=16 if local else 0, learning_rate=1e-3)
    for i in range(3):
        metrics = reward.fit(outcome_of(painted(16, dark=True, seed=i)))
    good = reward(outcome_of(painted(16, dark=False, seed=98))).values
    bad = reward(outcome_of(painted(16, dark=True, seed=99))).values
    assert good.min() > bad.max()
    assert metrics["anchor_accuracy"] == 1
    assert abs(float(bad.mean())) < 0.3  # the scale: like the first samples, like the references
    assert abs(float(good.mean()) - 1) < 0.3


def test_value_is_the_weighted_score_of_the_features_it_learned_from(made):
    """Both are the plain library's arithmetic on features of one length."""
    reward, outcome = made(), outcome_of(painted(8, dark=True))
    reward.fit(outcome)
    tokens = tiles((outcome.media * 255).round() / 255)
    tokens = tokens / tokens.norm(dim=-1, keepdim=True) * 192**0.5
    said = reward.head(tokens)[..., 0]
    expected = (0.7 * said[:, 0] + 0.3 * said[:, 1:].mean(1) - reward._zero) / reward._unit
    assert_close(reward(outcome).values[:, 0], expected.detach())
    assert_close(reward._past.norm(dim=-1), torch.full(reward._past.shape[:2], 192**0.5))


def test_fewer_places_are_learned_from_than_there_are(made):
    reward = made(patches=5, buffer=10)
    reward.fit(outcome_of(painted(16, dark=True)))
    assert reward._past.shape == (10, 6, 192)


def test_only_the_head_learns_and_only_in_lessons(made):
    reward, outcome = made(), outcome_of(painted(8, dark=True))
    before = weights(reward)
    reward(outcome)
    assert same(before, weights(reward))
    reward.fit(outcome)
    assert not same(before, weights(reward))


def test_a_critic_that_is_sure_enough_is_not_trained_further(made):
    reward = made(enough=0.9, learning_rate=1e-3)
    lessons = []
    for i in range(3):
        before = weights(reward)
        lessons.append(reward.fit(outcome_of(painted(16, dark=True, seed=i)))["trained"])
        assert same(before, weights(reward)) == (lessons[-1] == 0)
    assert lessons == [1, 0, 0]


def test_lessons_come_every_so_many_iterations_and_samples_of_all_are_kept(made):
    reward = made(every=2)
    found = [reward.fit(outcome_of(painted(16, dark=True, seed=i))) for i in range(3)]
    assert [one["trained"] for one in found] == [1, 0, 1]
    assert [one["buffer"] for one in found] == [12, 28, 44]  # four of the first are anchors


def test_a_lesson_that_forgets_the_anchors_is_undone(made):
    reward = made(learning_rate=1e-3, tolerance=0.1, fresh=1.0)
    reward.fit(outcome_of(painted(16, dark=True)))
    before, scale = weights(reward), (reward._zero, reward._unit)
    reward._real = (reward._anchors, reward._real[1])  # poisoned: what it is told to prefer is the bad
    reward.updates = 200
    metrics = reward.fit(outcome_of(painted(16, dark=False)))
    assert metrics["undone"] == 1
    assert metrics["reached_accuracy"] < 0.8 <= metrics["anchor_accuracy"]
    assert same(before, weights(reward))
    assert scale == (reward._zero, reward._unit)


@pytest.mark.slow
def test_a_critic_may_follow_samples_that_move_away_from_the_first_ones(made):
    """It must: samples that look like references to it, and are none, have found its flaw."""
    reward = made(learning_rate=1e-3, fresh=1.0, updates=100)
    reward.fit(outcome_of(painted(16, dark=True)))
    reward._anchors = reward._real[1]  # as if it had to give up all that it knew of them
    steeper = 2 * (painted(16, dark=False, seed=1) - 0.5) + 0.5  # of what references have, more
    fooled = outcome_of(steeper.clamp(0, 1))
    first = reward.fit(fooled)
    assert first["fresh_accuracy"] < 0.4
    lessons = [reward.fit(fooled) for _ in range(8)]
    assert sum(one["undone"] for one in lessons) == 0
    assert lessons[-1]["fresh_accuracy"] > 0.9


def test_a_step_with_a_nan_is_not_made(made):
    reward = made(updates=3)
    reward.fit(outcome_of(painted(16, dark=True)))
    before = weights(reward)
    reward._real = (torch.full_like(reward._real[0], torch.nan), reward._real[1])
    metrics = reward.fit(outcome_of(painted(16, dark=True)))
    assert metrics["skipped"] == 3
    assert same(before, weights(reward))


def test_alarms_count_lessons_in_a_row(made):
    reward = made(learning_rate=1e-3)
    assert reward.fit(outcome_of(painted(16, dark=True)))["unsure_for"] == 1  # it knew nothing
    sure = [reward.fit(outcome_of(painted(16, dark=True, seed=i))) for i in (1, 2)]
    assert [one["sure_for"] for one in sure] == [1, 2]
    like = reward.fit(outcome_of(painted(16, dark=False, seed=3)))
    assert (like["sure_for"], like["fresh_accuracy"] < 0.9) == (0, True)


def alarms(caught):
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


@pytest.mark.parametrize(
    ("settings", "metric", "said"),
    [
        ({"learning_rate": 1e-3}, "sure_for", "nearly all samples from references for 3 iterations"),
        ({"enough": 0.0}, "unsure_for", "has not known samples from references for 3 iterations"),
    ],
)
def test_a_critic_that_is_too_strong_or_lost_for_long_is_said_once_with_the_mend(
    made, monkeypatch, settings, metric, said
):
    monkeypatch.setattr(adversarial, "ALARM", 3)
    reward, counts = made(**settings), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(7):
            counts.append(reward.fit(outcome_of(painted(16, dark=True, seed=i)))[metric])
            mine = [one for one in alarms(caught) if said in one]
            assert len(mine) == (max(counts) >= 3)
    assert counts[-1] >= 5  # it went on, and was said at its third alone
    assert "updates" in mine[0]
    assert "learning_rate" in mine[0]


def test_twenty_iterations_are_the_shipped_patience(made):
    reward = made()
    for sure, unsure in ((adversarial.ALARM - 1, 0), (0, adversarial.ALARM - 1)):
        reward._sure, reward._unsure = sure, unsure
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reward._alarm(1.0)
    reward._sure = adversarial.ALARM
    with pytest.warns(RuntimeWarning, match="for 20 iterations in a row"):
        reward._alarm(1.0)


def test_samples_that_all_get_the_same_reward_are_said_once(made):
    """A policy that draws one picture; before the first lesson all have 0, which is no alarm."""
    reward, one = made(learning_rate=1e-3), painted(1, dark=True).expand(16, -1, -1, -1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert reward.fit(outcome_of(painted(16, dark=True)))["fresh_spread"] == 0
        reward.fit(outcome_of(painted(16, dark=True, seed=1)))
        assert not alarms(caught)
        for _ in range(2):
            assert reward.fit(outcome_of(one))["fresh_spread"] < 1e-5
    (said,) = alarms(caught)
    assert "the same reward" in said
    assert "the policy has collapsed" in said


def test_fresh_spread_is_the_deviation_of_the_scores_before_the_lesson(made):
    reward = made(learning_rate=1e-3)
    reward.fit(outcome_of(painted(16, dark=True)))
    samples = outcome_of(torch.cat([painted(8, dark=True, seed=1), painted(8, dark=False, seed=1)]))
    scores = reward(samples).values[:, 0] * reward._unit + reward._zero
    expected = (scores - scores.mean()).square().mean().sqrt().item()
    assert expected > 0.1
    assert reward.fit(samples)["fresh_spread"] == pytest.approx(expected, rel=1e-4)


def test_it_resumes_exactly(made, tmp_path):
    reward = made(patches=4, buffer=20)
    reward.fit(outcome_of(painted(16, dark=True)))
    torch.save(reward.state_dict(), tmp_path / "state.pt")
    other = made(patches=4, buffer=20)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for i in (1, 2):
        samples = outcome_of(painted(16, dark=True, seed=i))
        assert reward.fit(samples) == other.fit(samples)
    assert same(weights(reward), weights(other))
    assert torch.equal(reward(samples).values, other(samples).values)


def test_the_order_of_samples_does_not_matter(made):
    samples = outcome_of(painted(16, dark=True))
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    shuffled = Outcome(samples.prompts.take(rows), samples.media[rows])
    one, other = made(), made()
    assert one.fit(samples) == other.fit(shuffled)
    assert same(weights(one), weights(other))


def learn(rank, folder, references):
    """What one of two processes has learned from its half of the samples."""
    place = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    samples = outcome_of(painted(16, dark=True))
    rows = torch.arange(16)[1 - rank :: 2]
    reward = load("adversarial", references=references, features="pixels", width=32)
    metrics = reward.fit(Outcome(samples.prompts.take(rows), samples.media[rows]))
    torch.save({"weights": weights(reward), "metrics": metrics}, f"{folder}/rank_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(made, references, tmp_path):
    torch.multiprocessing.spawn(learn, (str(tmp_path), str(references)), nprocs=2)
    one = made()
    metrics = one.fit(outcome_of(painted(16, dark=True)))
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first["weights"], second["weights"])
    assert first["metrics"] == second["metrics"]
    for mine, theirs in zip(weights(one), first["weights"], strict=True):
        assert_close(theirs, mine, atol=1e-5, rtol=0)
    assert first["metrics"].keys() == metrics.keys()


def test_it_draws_nothing_from_the_global_stream(made):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    reward = made()
    reward.fit(outcome_of(painted(8, dark=True)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["zip", "tar", "shards", "listed"])
def test_references_are_as_good_in_archives_shards_and_listed_folders(made, references, tmp_path, kind):
    files, place = sorted(references.iterdir()), tmp_path / "all"
    if kind == "zip":
        place = place.with_suffix(".zip")
        with zipfile.ZipFile(place, "w") as archive:
            for file in files:
                archive.write(file, file.name)
    elif kind == "listed":
        shutil.copytree(references, place)
        shutil.copy(files[0], place / "other.png")
        shutil.copy(files[0], place / "unnamed.png")
        rows = [{"file_name": file.name} for file in files] + [{"file_name": "other.png", "split": "test"}]
        (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parts = [files] if kind == "tar" else [files[:5], files[5:]]
        place = place.with_suffix(".tar") if kind == "tar" else place
        for number, part in enumerate(parts):
            shard = place if kind == "tar" else place / f"{number}.tar"
            shard.parent.mkdir(exist_ok=True)
            with tarfile.open(shard, "w") as archive:
                for file in part:
                    archive.add(file, file.name)
    one = made()
    other = load("adversarial", references=str(place), features="pixels", width=32)
    samples = outcome_of(painted(16, dark=True))
    assert one.fit(samples) == other.fit(samples)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "metadata.jsonl, line 2: is no JSON object with a 'file_name', got '{'"),
        ('{"text": "a red dot"}', "line 2: is no JSON object with a 'file_name'"),
        ('{"file_name": "gone.png"}', "gone.png: named in metadata.jsonl, line 2, but missing"),
    ],
)
def test_a_list_of_references_that_is_none_is_named(references, tmp_path, line, said):
    place = tmp_path / "all"
    shutil.copytree(references, place)
    first = json.dumps({"file_name": min(references.iterdir()).name})
    (place / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(said)):
        load("adversarial", references=str(place), features="pixels")


def test_references_are_brought_to_the_size_of_samples(tmp_path):
    picture = torch.zeros(3, 20, 40)
    picture[:, :, 10:30] = 1  # the middle square
    Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "wide.png")
    assert torch.equal(fitted(tmp_path / "wide.png", 20, 20), torch.ones(1, 3, 20, 20))
    assert fitted(tmp_path / "wide.png", 10, 30).shape == (1, 3, 10, 30)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "wgan"}, "loss must be one of hinge, logistic, pairwise"),
        ({"local": 0.0}, "patches and local are both 0 or both positive"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"fresh": 1.5}, r"fresh must lie in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"buffer": -1}, "buffer must not be negative"),
        ({"features": "inception"}, "there are no features 'inception'"),
    ],
)
def test_settings_out_of_range_are_refused(made, settings, said):
    with pytest.raises(ValueError, match=said):
        made(**settings)


def test_references_that_are_not_there_or_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder, a zip or a"):
        load("adversarial", references=str(tmp_path / "nowhere"), features="pixels")
    with pytest.raises(ValueError, match="holds 0 pictures"):
        load("adversarial", references=str(tmp_path), features="pixels")
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as a picture"):
        load("adversarial", references=str(tmp_path), features="pixels")


def test_patches_of_a_transformer_are_seen(made, tmp_path):
    """Features of the whole and of the patches are what the plain library gives."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    reward = made(features=str(tmp_path / "dino"))
    images = (torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    with torch.no_grad():
        out = model(pixel_values=(images - 0.5) / 0.5)
    expected = torch.nn.functional.normalize(out.last_hidden_state, dim=-1) * 4  # the first token is pooled
    assert_close(reward._tokens(images), expected, atol=1e-4, rtol=1e-3)
    assert not any(p.requires_grad for p in reward._backbone.__self__._model.parameters())


def test_the_real_network_has_the_places_whose_mean_it_pools():
    pytest.importorskip("efficientnet_lite_pytorch")
    from mmalign.rewardmodels.features import load_features

    extract = load_features("efficientnet")
    tokens = extract.tokens(painted(2, dark=True))
    assert tokens.shape == (2, 50, 1280)
    assert_close(tokens[:, 0], tokens[:, 1:].mean(1))


def test_its_gradient_is_that_of_its_value_and_leaves_the_critic_alone(made):
    reward = made(learning_rate=1e-3)
    reward.fit(outcome_of(painted(16, dark=True)))
    media = painted(4, dark=True, seed=3).clamp(0.1, 0.9).requires_grad_()
    value = reward.differentiate(outcome_of(media))
    assert_close(value.detach(), reward(outcome_of(media.detach())).values[:, 0])
    value.sum().backward()
    assert all(parameter.grad is None for parameter in reward.head.parameters())
    assert all(parameter.requires_grad for parameter in reward.head.parameters())
    # Steps of many gray levels, over which rounding to 256 of them averages out.
    along = media.grad.sign()
    ends = [reward(outcome_of((media + side * 0.02 * along).detach())).values[:, 0] for side in (1, -1)]
    slope = (media.grad * along).flatten(1).sum(1)
    assert_close((ends[0] - ends[1]) / 0.04, slope, rtol=0.05, atol=0.02)
