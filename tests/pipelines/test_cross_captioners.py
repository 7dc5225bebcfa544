"""Captioners without a token for a picture: what they write is what transformers writes, to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import CROSS, pictures, tiny_captioner
from test_captioner import KEY, asked, assert_same_learning, policy_of, stir
from torch import Tensor
from torch.testing import assert_close

from mmalign.algorithms.grpo import GRPO
from mmalign.contracts import TextSettings
from mmalign.data import Prompt, PromptSource
from mmalign.pictures import open_picture
from mmalign.pipelines.captioner import CaptionPolicy
from mmalign.pipelines.encoder_decoder import _whole
from mmalign.records import Outcome, Plan, RewardSignal
from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

GREEDY = TextSettings(max_tokens=8, temperature=1e-4)
TOWERS = {"BLIP": "vision_model", "GIT": "git.image_encoder", "Florence2": "model.vision_tower"}
ENCODERS = {**TOWERS, "Florence2": "model.language_model.encoder"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return pictures(tmp_path_factory.mktemp("pictures"), 2)


@pytest.fixture(scope="module", params=CROSS)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, tiny_captioner(request.param, tmp_path_factory.mktemp(request.param))


def generated(policy: CaptionPolicy, name: str, prompt: str, picture: str, tokens: int) -> list[int]:
    """What `generate` of transformers writes by its own processor, without the prompt."""
    shown = open_picture(picture)
    processor, model = policy.adapter.processor, policy.module
    rules = {"max_new_tokens": tokens, "do_sample": False}
    rules["bad_words_ids"] = [[int(token)] for token in policy.adapter.banned]
    if name == "BLIP":
        # Its own way: the last token of what the tokenizer gives is left out, the first becomes <bos>.
        read = processor(images=shown, text=f"<bos> {prompt} <end>", return_tensors="pt")
        ids = model.generate(**{k: v for k, v in read.items() if k != "token_type_ids"}, **rules)[0]
        return ids[read["input_ids"].shape[1] - 1 :].tolist()
    if name == "GIT":
        pixels = processor(images=shown, return_tensors="pt")["pixel_values"]
        words = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        words = torch.tensor([[processor.tokenizer.cls_token_id, *words]])
        ids = model.generate(pixel_values=pixels, input_ids=words, **rules)[0]
        return ids[words.shape[1] :].tolist()
    read = processor(images=shown, text=prompt, return_tensors="pt")
    rules["bad_words_ids"] = [w for w in rules["bad_words_ids"] if w != [processor.tokenizer.bos_token_id]]
    names = ("input_ids", "attention_mask", "pixel_values")
    rules["max_new_tokens"] = tokens + 1  # it counts the one that is given
    return model.generate(**{k: read[k] for k in names}, **rules)[0, 2:].tolist()


def forward(policy: CaptionPolicy, name: str, inputs: dict[str, Tensor], token: Tensor) -> Tensor:
    """Logits after the prompt and each of the tokens but the last, of one plain forward: [T, V]."""
    words, pixels, count = inputs["input_ids"], inputs["pixel_values"], len(token)
    if name == "Florence2":
        begun = torch.cat([inputs["decoder_input_ids"], token[None]], 1)
        names = ("input_ids", "attention_mask", "pixel_values")
        logits = policy.module(**{k: inputs[k] for k in names}, decoder_input_ids=begun).logits
    else:
        logits = policy.module(pixel_values=pixels, input_ids=torch.cat([words, token[None]], 1)).logits
    return logits[0, -count - 1 : -1]


def test_its_texts_are_those_of_generate(family, files):
    name, folder = family
    policy, prompts = policy_of(folder, GREEDY), asked(files, 1)
    said = policy.texts(prompts, KEY)
    for text, question, extra in zip(said, prompts.text, prompts.extra, strict=True):
        ids = generated(policy, name, question, str(extra["image"]), 8)
        assert text == policy.adapter.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(set(said)) > 1


def test_its_log_probabilities_are_those_of_one_plain_forward(family, files):
    name, folder = family
    policy = policy_of(folder, TextSettings(max_tokens=8))
    stir(policy)
    trajectory = policy.sample(asked(files, 2), Plan(1), KEY)
    prompts = trajectory.outcome.prompts
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), 3):
        now = policy.evaluate(trajectory, pick).log_prob
        assert_close(now, trajectory.log_prob[pick.rows, pick.columns], atol=2e-5, rtol=0)
    for row in range(len(trajectory)):
        token = trajectory.replay["token"][row, : int(trajectory.mask[row].sum())]
        inputs = dict(policy._inputs(prompts.text[row], str(prompts.extra[row]["image"])))
        with torch.no_grad():
            logits = forward(policy, name, inputs, token)
        logits[:, list(policy.adapter.banned)] = -torch.inf
        wanted = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        assert_close(trajectory.log_prob[row, : len(token)], wanted, atol=2e-5, rtol=0)


def test_a_shared_prefix_changes_neither_loss_nor_gradient(family, files):
    shared, apart = (
        policy_of(family[1], TextSettings(max_tokens=8, share_prefix=share)) for share in (True, False)
    )
    stir(shared)
    stir(apart)
    trajectory = shared.sample(asked(files), Plan(1), KEY)
    assert_same_learning(shared, apart, trajectory)


def test_what_looks_runs_once_for_a_group(family, files):
    name, folder = family
    policy = policy_of(folder)
    rows: dict[str, list[int]] = {}
    for part in {TOWERS[name], ENCODERS[name]}:
        seen = rows.setdefault(part, [])
        policy.module.get_submodule(part).register_forward_hook(
            lambda module, given, out, seen=seen: seen.append(len(out[0]))
        )
    trajectory = policy.sample(asked(files, 5), Plan(1), KEY)
    assert all(sum(seen) == len(files) for seen in rows.values())
    for seen in rows.values():
        seen.clear()
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), 5):
        policy.evaluate(trajectory, pick)
    assert all(seen == [1, 1] for seen in rows.values())


class Dogs:
    """How often a text names a dog."""

    name = "dogs"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        texts: Any = outcome.media
        return RewardSignal(self.name, torch.tensor([[float(text.count("dog"))] for text in texts]))


def test_a_step_of_grpo_moves_nothing_but_adapters(family, files):
    policy = policy_of(family[1], TextSettings(max_tokens=8))
    prompts = [Prompt(text, {"image": file}) for text in ("describe", "two") for file in files]
    before = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    trainer = Trainer(
        policy,
        GRPO().build({"dogs": 1.0}),
        Scorer([Dogs()]),
        PromptSource(prompts, 2, 8, 0),
        TrainingSettings(iterations=1, updates=1, learning_rate=1e-2, ema_decay=0),
    )
    metrics = trainer.step(0)
    assert metrics["reward/dogs/group_std"] > 0
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["noise_floor/max"] < 2e-5
    moved = {n for n, p in policy.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert not any(TOWERS[family[0]] in name for name in moved)


def test_it_must_see(family, files):
    policy = policy_of(family[1])
    policy.check(asked(files))
    with torch.no_grad():
        for p in policy.module.get_submodule(TOWERS[family[0]]).parameters():
            p.zero_()
    with pytest.raises(ValueError, match="does not depend on the picture"):
        policy.check(asked(files))


def test_no_text_holds_a_special_token(family, files):
    policy = policy_of(family[1], TextSettings(max_tokens=30, temperature=50.0))
    trajectory = policy.sample(asked(files, 8), Plan(1), KEY)
    written = set(trajectory.replay["token"][trajectory.mask].tolist())
    assert written.isdisjoint(policy.adapter.banned)
    assert written & set(policy.adapter.ends)
    assert policy.adapter.tokenizer.pad_token_id in policy.adapter.banned


def test_a_picture_of_another_size_is_refused(tmp_path, files):
    policy = policy_of(tiny_captioner("GIT", tmp_path))
    policy.adapter.picture_tokens = 99
    with pytest.raises(ValueError, match="came to 17 places before the text"):
        policy.sample(asked(files), Plan(1), KEY)


def test_places_that_were_not_kept_are_an_error(tmp_path, files):
    policy = policy_of(tiny_captioner("BLIP", tmp_path))
    whole = policy.adapter.prefix(policy.module, [policy._inputs("two", files[0])])
    assert _whole(whole.cache) is whole.cache
    with pytest.raises(ValueError, match="kept 17 of the 16 places"):
        _whole(replace(whole.cache, states=whole.cache.states[:, 1:]))
