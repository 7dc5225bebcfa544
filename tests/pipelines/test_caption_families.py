"""Every family of captioners, by one adapter: what it writes is what transformers writes, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from captioners import FAMILIES, pictures, tiny_captioner
from test_captioner import KEY, asked, assert_same_learning, policy_of, stir
from torch.testing import assert_close

from mmalign.contracts import TextSettings
from mmalign.records import Plan

pytest.importorskip("num2words")  # of SmolVLM's processor
GREEDY = TextSettings(max_tokens=8, temperature=1e-4)
WRITTEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return pictures(tmp_path_factory.mktemp("pictures"), 2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, tiny_captioner(request.param, tmp_path_factory.mktemp(request.param))


def test_its_texts_are_those_of_generate(family, files):
    policy, prompts = policy_of(family[1], GREEDY), asked(files, 1)
    said = policy.texts(prompts, KEY)
    for text, question, extra in zip(said, prompts.text, prompts.extra, strict=True):
        inputs = policy._inputs(question, str(extra["image"]))
        banned = [[int(token)] for token in policy.adapter.banned]
        ids = policy.module.generate(**inputs, max_new_tokens=8, do_sample=False, bad_words_ids=banned)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert text == policy.adapter.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_its_log_probabilities_are_those_of_one_plain_forward(family, files):
    name, folder = family
    policy = policy_of(folder, TextSettings(max_tokens=8))
    stir(policy)
    prompts = asked(files, 2)
    trajectory = policy.sample(prompts, Plan(1), KEY)
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), 3):
        now = policy.evaluate(trajectory, pick).log_prob
        assert_close(now, trajectory.log_prob[pick.rows, pick.columns], atol=2e-5, rtol=0)
    for row in range(len(trajectory)):
        length = int(trajectory.mask[row].sum())
        token = trajectory.replay["token"][row, :length][None]
        inputs = dict(policy._inputs(prompts.text[row], str(prompts.extra[row]["image"])))
        read = inputs["input_ids"].shape[1]
        for part in WRITTEN:
            if part in inputs:
                # What PaliGemma writes is marked 1: with 0 it would see what comes after it.
                mark = 1 if part == "attention_mask" or (part, name) == ("token_type_ids", "PaliGemma") else 0
                more = token if part == "input_ids" else torch.full_like(token, mark)
                inputs[part] = torch.cat([inputs[part], more], 1)
        with torch.no_grad():
            logits = policy.module(**inputs).logits[0, read - 1 : -1]
        logits[:, list(policy.adapter.banned)] = -torch.inf
        wanted = logits.log_softmax(-1).gather(1, token[0][:, None])[:, 0]
        assert_close(trajectory.log_prob[row, :length], wanted, atol=2e-5, rtol=0)


def test_a_shared_prefix_changes_neither_loss_nor_gradient(family, files):
    shared, apart = (
        policy_of(family[1], TextSettings(max_tokens=8, share_prefix=share)) for share in (True, False)
    )
    stir(shared)
    stir(apart)
    trajectory = shared.sample(asked(files), Plan(1), KEY)
    assert_same_learning(shared, apart, trajectory)


def test_it_sees_its_picture_and_trains_only_what_speaks(family, files):
    policy = policy_of(family[1])
    policy.check(asked(files))
    trained = [name for name, p in policy.module.named_parameters() if p.requires_grad]
    assert trained
    assert not any("vision" in name or "visual" in name for name in trained)
