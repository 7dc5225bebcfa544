"""The latent identity reward: the denoiser's features, its contract, its training, what is shipped."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT
from torch import nn
from torch.testing import assert_close

from mmalign.contracts import LatentReward, PolicySettings
from mmalign.data import read_prompts
from mmalign.lab.identity_clips import draw_identity_clips, reference_picture
from mmalign.records import Outcome
from mmalign.rewardmodels.latent_identity import (
    IdentityNetwork,
    LatentIdentity,
    LatentSpace,
    reference_of,
)
from mmalign.rewardmodels.latent_identity_training import (
    EDGES,
    LabeledLatents,
    _another,
    label_latents,
    measure_identity,
    read_labeled_videos,
    train_identity,
)
from mmalign.testing import check_reward, prompts_of

BASE = str(ROOT / "assets/lab/video")
SHIPPED = ROOT / "assets/lab/video_identity"


@pytest.fixture(scope="module")
def denoiser():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(BASE, subfolder="transformer").float().eval()


@pytest.fixture(scope="module")
def space() -> LatentSpace:
    return LatentSpace(BASE)


@pytest.fixture(scope="module")
def drawn():
    return draw_identity_clips(8, "train", 0)


@pytest.fixture(scope="module")
def folder(denoiser, tmp_path_factory):
    place = tmp_path_factory.mktemp("identity")
    IdentityNetwork(copy.deepcopy(denoiser), 2, seed=1).save(place, BASE)
    return place


@pytest.fixture(scope="module")
def reward(folder) -> LatentIdentity:
    return LatentIdentity(str(folder))


@pytest.fixture(scope="module")
def outcome(drawn, tmp_path_factory) -> Outcome:
    place, extras = tmp_path_factory.mktemp("references"), []
    for i, clip in enumerate(drawn):
        Image.fromarray(clip.reference).save(place / f"{i}.png")
        extras.append({"reference_image": str(place / f"{i}.png")})
    return Outcome(prompts_of([clip.prompt for clip in drawn], 1, extras), media_of(drawn))


def media_of(clips) -> torch.Tensor:
    return torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3).float() / 255


def labeled(space, clips) -> LabeledLatents:
    return label_latents(
        space,
        media_of(clips),
        torch.from_numpy(np.stack([clip.reference for clip in clips])).permute(0, 3, 1, 2),
        [clip.prompt for clip in clips],
        [clip.kept for clip in clips],
        [clip.kind for clip in clips],
    )


def inputs(count: int = 3, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(count, 8, 5, 8, 8), (count,), (count, 16, 96), (count, 8, 1, 8, 8)]
    z, time, text, still = (torch.randn(shape, generator=draw) for shape in shapes)
    return z, 500 + 100 * time, text, still


# ---- the network


@pytest.mark.parametrize("blocks", [1, 3])
def test_features_are_what_the_whole_denoiser_has_behind_that_block(denoiser, blocks):
    seen = []
    handle = denoiser.blocks[blocks - 1].register_forward_hook(lambda *args: seen.append(args[2]))
    z, time, text, _ = inputs()
    with torch.no_grad():
        denoiser(z, time, text)
        handle.remove()
        found = IdentityNetwork(copy.deepcopy(denoiser), blocks).features(z, time, text)
    assert_close(found, seen[0])


@pytest.mark.parametrize("query", ["reference", "video"])
def test_what_asks_is_a_setting_that_is_kept(denoiser, query, tmp_path):
    network = IdentityNetwork(copy.deepcopy(denoiser), 1, query)
    sizes = []
    network.attention.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    with torch.no_grad():
        logits = network(*inputs())
    assert logits.shape == (3,)
    assert sizes == [{"reference": 16, "video": 80}[query]]
    network.save(tmp_path, BASE)
    again = IdentityNetwork.load(tmp_path)
    assert again.query == query
    with torch.no_grad():
        assert_close(again(*inputs()), logits, atol=5e-3, rtol=5e-3)  # weights in fp16


def test_both_ways_of_asking_differ(denoiser):
    with torch.no_grad():
        one, other = (
            IdentityNetwork(copy.deepcopy(denoiser), 1, query)(*inputs()) for query in ("reference", "video")
        )
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [((0,), r"blocks must lie in 1\.\.4"), ((1, "text"), "query must be reference or video")],
)
def test_networks_that_cannot_be_are_refused(denoiser, settings, said):
    with pytest.raises(ValueError, match=said):
        IdentityNetwork(copy.deepcopy(denoiser), *settings)


# ---- the latents


def test_the_latents_and_texts_are_those_of_the_policy(space, drawn):
    from mmalign.pipelines.wan import Wan

    adapter = Wan(PolicySettings(BASE, height=32, width=32, frames=9, max_sequence_length=16))
    media, texts = media_of(drawn[:2]), [clip.prompt for clip in drawn[:2]]
    with torch.no_grad():
        assert_close(space.videos(media), adapter.latents(media))
        theirs = torch.stack([adapter.encode(text)["embeds"] for text in texts])
    assert_close(space.texts(texts, torch.device("cpu")), theirs)
    sigma = torch.tensor([0.3])
    assert space.time(sigma).tolist() == pytest.approx([300.0])


def test_a_reference_is_a_video_of_one_frame_and_encoded_once(space, tmp_path):
    picture = reference_picture("red", "star")
    Image.fromarray(picture).save(tmp_path / "star.png")
    file, cpu = str(tmp_path / "star.png"), torch.device("cpu")
    found = space.reference(file, (8, 8), cpu)
    still = torch.from_numpy(picture).permute(2, 0, 1).float()[None, None] / 255
    assert_close(found, space.videos(still)[0])
    assert found.shape == (8, 1, 8, 8)
    (tmp_path / "star.png").unlink()
    assert space.reference(file, (8, 8), cpu) is found


def test_a_prompt_names_its_reference_by_itself_or_by_its_source():
    assert reference_of({"reference_image": "a.png", "source": "b.png"}) == "a.png"
    assert reference_of({"source": ["b.png", "c.png"]}) == "b.png"
    assert reference_of({"reference": "a caption"}) is None


# ---- the reward


def test_it_keeps_the_contract(reward, outcome):
    assert isinstance(reward, LatentReward)
    check_reward(reward, outcome)


def test_a_call_is_the_value_of_the_clean_latents(reward, outcome):
    z = reward._space.videos(outcome.media)
    found = reward.on_latents(outcome.prompts, z, torch.zeros(()))
    assert_close(reward(outcome).values[:, 0], found, atol=1e-6, rtol=1e-5)
    assert ((found > 0) & (found < 1)).all()


def test_it_depends_on_the_reference_the_noise_level_and_the_text(reward, outcome):
    z = reward._space.videos(outcome.media)
    half = torch.tensor(0.5)
    plain = reward.on_latents(outcome.prompts, z, half)
    extra, text = outcome.prompts.extra, outcome.prompts.text
    for changed, sigma in (
        (replace(outcome.prompts, extra=extra[1:] + extra[:1]), half),
        (replace(outcome.prompts, text=text[1:] + text[:1]), half),
        (outcome.prompts, torch.tensor(0.9)),
    ):
        assert (reward.on_latents(changed, z, sigma) - plain).abs().max() > 1e-5


def test_gradients_reach_the_latents_and_nothing_else(reward, outcome):
    z = reward._space.videos(outcome.media).requires_grad_()
    reward.on_latents(outcome.prompts, z, torch.tensor(0.5)).sum().backward()
    assert (z.grad.flatten(1).norm(dim=1) > 0).all()
    parts = (reward._network, reward._space.pipeline.vae, reward._space.pipeline.text_encoder)
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())


def test_a_prompt_without_a_reference_has_no_verdict_and_no_gradient(reward, outcome):
    prompts = replace(outcome.prompts, extra=[{}, *outcome.prompts.extra[1:]])
    signal = reward(Outcome(prompts, outcome.media))
    assert signal.valid[:, 0].tolist() == [False, *[True] * 7]
    z = reward._space.videos(outcome.media).requires_grad_()
    value = reward.on_latents(prompts, z, torch.tensor(0.5))
    value.sum().backward()
    assert value[0] == 0
    assert not z.grad[0].any()
    assert z.grad[1].any()


def test_the_size_of_batches_changes_nothing(folder, reward, outcome):
    assert_close(LatentIdentity(str(folder), batch=3)(outcome).values, reward(outcome).values)


def test_views_are_judged_by_the_prompt_of_their_sample(reward, outcome):
    prompts = outcome.prompts.take(torch.arange(4))
    views = reward(Outcome(prompts, outcome.media, views=2)).values
    rows = torch.arange(4).repeat_interleave(2)
    assert_close(views, reward(Outcome(outcome.prompts.take(rows), outcome.media)).values)


def test_what_does_not_fit_is_said(reward, outcome, folder, tmp_path):
    with pytest.raises(ValueError, match="another autoencoder than that of the policy"):
        reward.on_latents(outcome.prompts, torch.zeros(8, 16, 5, 8, 8), torch.zeros(()))
    with pytest.raises(ValueError, match=r"there is no network in .*; scripts/latent_identity.py train"):
        LatentIdentity(str(tmp_path))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        LatentIdentity(str(folder), batch=0)
    with pytest.raises(ValueError, match="does not load as a Wan pipeline"):
        LatentIdentity(str(folder), base=str(tmp_path))


# ---- the training


def test_training_moves_blocks_and_head_alone_and_repeats(denoiser, space, drawn):
    data, found = labeled(space, drawn), []
    for _ in range(2):
        network, rows = IdentityNetwork(copy.deepcopy(denoiser), 1), []
        before = {name: p.clone() for name, p in network.named_parameters()}
        train_identity(network, space, data, steps=3, batch=4, log=rows.append)
        moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert all(
            name.startswith(("transformer.blocks.", "asks", "answers", "attention", "mlp")) for name in moved
        )
        assert any(name.startswith("transformer.blocks.") for name in moved)
        assert any(name.startswith("mlp") for name in moved)
        assert not any(p.requires_grad for p in network.parameters())
        found.append([row["loss"] for row in rows])
    assert len(found[0]) == 3
    assert found[0] == found[1]


def test_a_killed_training_goes_on_exactly(denoiser, space, drawn, tmp_path):
    data = labeled(space, drawn)

    def run(log=lambda row: None, **settings):
        network = IdentityNetwork(copy.deepcopy(denoiser), 1)
        train_identity(network, space, data, **{"steps": 5, "batch": 4, "every": 2} | settings, log=log)
        return network.state_dict()

    left = iter(range(3))

    def killed(row):
        if next(left) == 2:
            raise KeyboardInterrupt

    rows = []
    whole = run(rows.append)
    with pytest.raises(KeyboardInterrupt):
        run(killed, folder=tmp_path)
    for _ in range(2):  # the second time there is nothing left to do
        told = []
        again = run(told.append, folder=tmp_path)
        assert told == rows
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(ValueError, match=r"training.pt: was begun with other seed: use another --out"):
        run(folder=tmp_path, seed=1)


@pytest.mark.slow
def test_a_few_clips_are_learned_by_heart(denoiser, space, drawn):
    network, rows = IdentityNetwork(copy.deepcopy(denoiser), 1), []
    train_identity(network, space, labeled(space, drawn), steps=50, batch=8, lr=3e-3, log=rows.append)
    assert sum(row["loss"] for row in rows[-8:]) / 8 < 0.8 * sum(row["loss"] for row in rows[:4]) / 4


class Told(nn.Module):
    """A network that knows the subject by the first channel of clean latents, if it looks; else says yes."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks, self.one = looks, nn.Parameter(torch.ones(()))

    def forward(self, z, time, text, reference):
        if not self.looks:
            return self.one.expand(len(z))
        return text[:, 0, 0] - 10 * (text[:, 0, 1] - reference[:, 0, 0, 0, 0]).abs()


def known(kept: list[bool]) -> LabeledLatents:
    """Latents of noise, references 0, 1, 2, ..., and texts that tell label and reference."""
    count = len(kept)
    label = torch.tensor([1.0 if one else -1.0 for one in kept])
    text = torch.stack([label, torch.arange(count).float()], 1)[:, None]
    references = torch.arange(count).float().reshape(-1, 1, 1, 1, 1)
    kinds = ["kept" if one else "vanished" for one in kept]
    return LabeledLatents(
        torch.randn(count, 1, 2, 2, 2), references, text, torch.tensor(kept), kinds, torch.zeros(1, 2)
    )


def test_measures_are_those_of_a_judge_that_is_known(space):
    data = known([True, True, True, False])
    right = measure_identity(Told(looks=True), space, data)
    assert [(row["low"], row["high"]) for row in right] == list(pairwise(EDGES))
    assert all(row["accuracy"] == row["kept"] == row["vanished"] == row["ordered"] == 1 for row in right)
    blind = measure_identity(Told(looks=False), space, data)[0]
    assert [blind[name] for name in ("accuracy", "kept", "vanished", "ordered")] == [0.75, 1, 0, 0]


def test_equal_references_are_no_others(space):
    """Latents of pictures: distances by products would tell equal ones apart."""
    rows = 20 * torch.randn(2, 8 * 64, generator=torch.Generator().manual_seed(0))
    references = rows[[0, 0, 1, 1, 0]].reshape(5, 8, 1, 8, 8)
    data = replace(known([True] * 5), references=references)
    assert _another(data, torch.arange(5)).tolist() == [2, 2, 4, 4, 2]


def test_one_reference_for_all_cannot_be_shuffled(space):
    data = known([True, True])
    with pytest.raises(ValueError, match="all kept videos have one and the same reference"):
        measure_identity(Told(True), space, replace(data, references=torch.zeros(2, 1, 1, 1, 1)))


def test_a_set_of_ones_own_is_read_from_a_file(space, drawn, tmp_path):
    rows = []
    for i, clip in enumerate(drawn[:3]):
        (tmp_path / f"{i}").mkdir()
        for frame, pixels in enumerate(clip.frames):
            Image.fromarray(pixels).save(tmp_path / f"{i}/{frame}.png")
        Image.fromarray(clip.reference).save(tmp_path / f"{i}.png")
        rows.append(
            {"prompt": clip.prompt, "video": f"{i}", "reference_image": f"{i}.png", "kept": clip.kept}
        )
    file = tmp_path / "labeled.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found, wanted = read_labeled_videos(file, space, 32, 32, 9), labeled(space, drawn[:3])
    for name in ("latents", "references", "text", "kept"):
        assert_close(getattr(found, name), getattr(wanted, name))
    for change, said in (
        ({"kept": 1}, "line 1: needs a prompt, .* and kept"),
        ({"video": "9"}, "line 1: .*9"),
        ({"reference_image": "none.png"}, "line 1: there is no picture"),
    ):
        file.write_text(json.dumps(rows[0] | change))
        with pytest.raises(ValueError, match=said):
            read_labeled_videos(file, space, 32, 32, 9)
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="must be a folder of 5 frames"):
        read_labeled_videos(file, space, 32, 32, 5)


# ---- what is shipped


def test_the_shipped_prompts_have_references_videos_and_boxes():
    train, heldout = (read_prompts(SHIPPED / f"{split}.jsonl") for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (240, 96)
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert all(len(p.extra["boxes"]) == 9 and p.extra["video"] for p in train)
    assert all(reference_of(p.extra) for p in (*train, *heldout))


@pytest.mark.slow
def test_the_shipped_network_heeds_its_reference_at_every_noise_level(space):
    """On held-out clips; assets/lab/README.md has the figures of 600."""
    found = measure_identity(
        IdentityNetwork.load(SHIPPED), space, labeled(space, draw_identity_clips(120, "heldout", 1))
    )
    assert all(row["ordered"] > 0.85 for row in found)
    assert all(row["accuracy"] > 0.75 for row in found[:4])
    assert all(row["another"] > 0.6 for row in found)
