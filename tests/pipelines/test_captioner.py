"""A captioner of transformers as a policy: what it writes, how likely that was, and where its words stand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import pictures, tiny_llava
from torch import Tensor
from torch.testing import assert_close

from mmalign.contracts import LoraSettings, PolicySettings, TextSettings, Writes
from mmalign.pipelines import load
from mmalign.pipelines.captioner import CaptionPolicy, draw, spelled
from mmalign.records import Masks, Plan, Prompts, Spans, Steps, Whole
from mmalign.sde import Noise

KEY = (0, "sample", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return pictures(tmp_path_factory.mktemp("pictures"))


def policy_of(folder: Path, text: TextSettings | None = None, **settings: Any) -> CaptionPolicy:
    text = text or TextSettings(max_tokens=10)
    given = {"lora": LoraSettings(rank=4, alpha=8)} | settings
    policy = load(PolicySettings(str(folder), text=text, **given), Noise())
    assert isinstance(policy, CaptionPolicy)
    return policy


def asked(files: list[str], members: int = 3) -> Prompts:
    """Groups of members; prompts of two lengths."""
    texts = ("describe the picture", "two")
    group = torch.arange(len(files)).repeat_interleave(members)
    return Prompts(
        [texts[int(g) % len(texts)] for g in group],
        group,
        torch.arange(members).repeat(len(files)),
        [{"image": files[int(g)]} for g in group],
    )


def stir(policy: CaptionPolicy, size: float = 0.3) -> None:
    """Give every adapter an effect."""
    with torch.no_grad():
        for name, p in policy.module.named_parameters():
            if ".lora_B." in name:
                p.copy_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))


def gradients(policy: CaptionPolicy, trajectory, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    weight = torch.randn(trajectory.log_prob.shape, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(())
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), size):
        loss = (policy.evaluate(trajectory, pick).log_prob * weight[pick.rows, pick.columns]).sum()
        loss.backward()
        total += loss.detach()
    found = {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}
    policy.module.zero_grad()
    return total, found


def assert_same_learning(shared: CaptionPolicy, apart: CaptionPolicy, trajectory) -> None:
    """Of single precision: loss and every gradient are the same, whether a prefix is shared or not."""
    (loss, found), (other, wanted) = (gradients(policy, trajectory, 6) for policy in (shared, apart))
    assert_close(loss, other, atol=1e-4, rtol=1e-5)
    assert found.keys() == wanted.keys()
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    for part, gradient in found.items():
        assert_close(gradient, wanted[part], atol=1e-4 * float(wanted[part].abs().max()) + 1e-6, rtol=0)


def test_a_folder_in_transformers_format_needs_no_flag(folder):
    assert isinstance(policy_of(folder), Writes)


def test_its_texts_are_those_of_generate(folder, files):
    policy = policy_of(folder, TextSettings(max_tokens=10, temperature=1e-4))
    prompts = asked(files, 1)
    said = policy.texts(prompts, KEY)
    for text, question, extra in zip(said, prompts.text, prompts.extra, strict=True):
        inputs = policy._inputs(question, str(extra["image"]))
        banned = [[int(token)] for token in policy.adapter.banned]
        ids = policy.module.generate(**inputs, max_new_tokens=10, do_sample=False, bad_words_ids=banned)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert text == policy.adapter.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert len(set(said)) > 1


def test_its_log_probabilities_are_those_of_one_plain_forward(folder, files):
    policy = policy_of(folder, TextSettings(max_tokens=10, temperature=0.7))
    stir(policy)
    trajectory = policy.sample(asked(files), Plan(1), KEY)
    for row in range(len(trajectory)):
        length = int(trajectory.mask[row].sum())
        token = trajectory.replay["token"][row, :length]
        prompts = trajectory.outcome.prompts
        inputs = dict(policy._inputs(prompts.text[row], str(prompts.extra[row]["image"])))
        read = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = policy.module(**inputs).logits[0, read - 1 : -1] / 0.7
        logits[:, list(policy.adapter.banned)] = -torch.inf
        wanted = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        assert_close(trajectory.log_prob[row, :length], wanted, atol=2e-5, rtol=0)
        assert not trajectory.log_prob[row, length:].any()


def test_the_update_finds_the_log_probabilities_of_sampling(folder, files):
    policy = policy_of(folder)
    stir(policy)
    trajectory = policy.sample(asked(files), Plan(1), KEY)
    seen = torch.zeros_like(trajectory.mask)
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), 5):
        assert len(set(pick.rows.tolist())) <= 5
        seen[pick.rows, pick.columns] = True
        ratio = (
            policy.evaluate(trajectory, pick).log_prob - trajectory.log_prob[pick.rows, pick.columns]
        ).exp()
        assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    assert torch.equal(seen, trajectory.mask)


def test_a_shared_prefix_changes_neither_loss_nor_gradient(folder, files):
    shared = policy_of(folder)
    apart = policy_of(folder, TextSettings(max_tokens=10, share_prefix=False))
    for policy in (shared, apart):
        policy.module.double()  # only the norms of a Llama still compute in fp32
        stir(policy)
    trajectory = shared.sample(asked(files), Plan(1), KEY)
    (loss, found), (other, wanted) = (gradients(policy, trajectory, 6) for policy in (shared, apart))
    assert_close(loss, other, atol=1e-7, rtol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], atol=1e-6 * float(wanted[name].abs().max()) + 2e-6, rtol=0)


def test_a_group_is_read_once(folder, files):
    policy = policy_of(folder)
    pictures_read, towers = [], [m for n, m in policy.module.named_modules() if n.endswith("vision_tower")]
    towers[0].register_forward_hook(lambda module, given, out: pictures_read.append(len(out[0])))
    trajectory = policy.sample(asked(files, 5), Plan(1), KEY)
    assert sum(pictures_read) == len(files)
    pictures_read.clear()
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), 10):
        policy.evaluate(trajectory, pick)
    assert pictures_read == [2, 2]


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_text_depends_on_its_name_alone(folder, files, chunk):
    policy, prompts = policy_of(folder), asked(files)
    whole = policy.sample(prompts, Plan(1), KEY).outcome.media
    policy.chunk = chunk
    rows = torch.tensor([7, 2, 10, 0])
    assert policy.sample(prompts.take(rows), Plan(1), KEY).outcome.media == [whole[row] for row in rows]
    assert policy.texts(prompts.take(rows), KEY) == [whole[row] for row in rows]
    assert policy.sample(prompts, Plan(1), (0, "sample", 1)).outcome.media != whole


def test_no_text_holds_a_placeholder(folder, files):
    policy = policy_of(folder, TextSettings(max_tokens=40, temperature=50.0))
    trajectory = policy.sample(asked(files, 8), Plan(1), KEY)
    written = set(trajectory.replay["token"][trajectory.mask].tolist())
    assert written.isdisjoint(policy.adapter.banned)
    assert policy.adapter.tokenizer.convert_tokens_to_ids("<image>") in policy.adapter.banned
    assert written & set(policy.adapter.ends)


def test_a_text_ends_once(folder, files):
    policy = policy_of(folder, TextSettings(max_tokens=12, temperature=5.0))
    trajectory = policy.sample(asked(files, 8), Plan(1), KEY)
    ends = torch.isin(trajectory.replay["token"], torch.tensor(policy.adapter.ends)) & trajectory.mask
    length = trajectory.mask.sum(1)
    for row in range(len(trajectory)):
        assert trajectory.mask[row, : length[row]].all()
        assert bool(ends[row].any()) == bool(ends[row, length[row] - 1])
        assert ends[row].sum() <= 1
        assert ends[row].any() or length[row] == 12


@pytest.mark.parametrize(("others", "precision"), [(0, "fp32"), (4, "fp32"), (99, "fp16")])
def test_it_keeps_step_while_another_process_writes(folder, files, others, precision):
    """others: forwards that another process needs for its longest text, of which every one takes all."""
    policy = policy_of(folder, TextSettings(max_tokens=12, temperature=5.0), precision=precision)
    prompts = asked(files, 1)
    policy._ends = torch.arange(0, len(policy.adapter.tokenizer), 3)  # most texts are short
    calls: list[int] = []
    extend = policy.adapter.extend

    def counted(*given: Any) -> Any:
        calls.append(len(given[3]))
        assert torch.is_autocast_enabled("cpu") == (precision == "fp16")
        return extend(*given)

    policy.adapter.extend = counted
    alone = policy.sample(prompts, Plan(1), KEY)
    needed = len(calls)
    assert 0 < needed < 11
    calls.clear()
    policy.anyone = lambda mine: mine or len(calls) < others
    found = policy.sample(prompts, Plan(1), KEY)
    assert len(calls) == min(max(needed, others), 11)
    assert set(calls[needed:]) <= {1}
    assert found.outcome.media == alone.outcome.media
    assert torch.equal(found.log_prob, alone.log_prob)
    assert torch.equal(found.mask, alone.mask)


def test_a_reference_ends_as_the_chat_template_ends_a_turn(folder):
    adapter = policy_of(folder).adapter
    stop, end = adapter.tokenizer.convert_tokens_to_ids([".", "<end>"])
    assert adapter.end == end  # a template that ends no turn
    adapter = policy_of(folder).adapter
    adapter.ends = [end, stop]
    adapter.processor.chat_template += "{% if not add_generation_prompt %} . left{% endif %}"
    assert adapter.end == stop


def test_draws_follow_the_distribution():
    log_p = torch.tensor([0.5, 0.3, 0.0, 0.2]).log().expand(4000, 4)
    chance = (torch.arange(4000) + 0.5) / 4000
    share = torch.bincount(draw(log_p, chance), minlength=4) / 4000
    assert_close(share, torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=1e-3, rtol=0)
    share = torch.bincount(draw(log_p, chance, 0.6), minlength=4) / 4000
    assert_close(share, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=1e-3, rtol=0)
    assert draw(log_p[:2], torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 3]


def test_distributions_are_those_that_were_drawn_from(folder, files):
    policy = policy_of(folder)
    stir(policy)
    trajectory = policy.sample(asked(files), Plan(1), KEY)
    rows, seen = torch.tensor([1, 4, 5]), 0
    for at, log_p in policy.distributions(trajectory, rows, 4):
        inside = trajectory.mask[rows, at]
        assert log_p.shape[:2] == inside.shape
        token = trajectory.replay["token"][rows, at]
        found = log_p.gather(-1, token[..., None])[..., 0]
        assert_close(found[inside], trajectory.log_prob[rows, at][inside], atol=1e-5, rtol=0)
        assert_close(log_p.exp().sum(-1)[inside], torch.ones(int(inside.sum())))
        seen += inside.shape[1]
    assert seen == trajectory.mask.shape[1]


def test_claims_are_placed_on_their_words(folder, files):
    policy = policy_of(folder)
    trajectory = policy.sample(asked(files), Plan(1), KEY)
    text, row = trajectory.outcome.media[0], 0
    words, start, end = text.split(" "), trajectory.replay["start"][row], trajectory.replay["end"][row]
    assert [text[a:b].strip() for a, b in zip(start[: len(words)], end[: len(words)], strict=True)] == words
    first = len(words[0])
    spans = Spans(torch.full((len(trajectory), 1), first + 1), torch.full((len(trajectory), 1), first + 2))
    assert policy.locate(spans, trajectory)[row, 0].tolist() == [0.0, 1.0] + [0.0] * 8
    assert policy.locate(Whole(), trajectory).shape == (1, 1, 10)
    assert policy.locate(Steps(torch.tensor([[2]])), trajectory)[0, 0].nonzero().tolist() == [[2]]
    with pytest.raises(TypeError, match="a captioner cannot place Masks"):
        policy.locate(Masks(torch.ones(1, 1, 1, 2, 2)), trajectory)


class Bytes:
    """A tokenizer whose characters take several tokens, and whose texts begin with a space."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_counts_for_the_last_of_them():
    ids = " é x".encode()
    text, places = spelled(Bytes(), list(ids))
    assert text == "é x"
    assert places == [(0, 0), (0, 0), (0, 1), (1, 2), (2, 3)]


def test_what_it_saves_is_loaded_by_peft_and_by_itself(folder, files, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    policy, prompts = policy_of(folder, TextSettings(max_tokens=10, temperature=1e-4)), asked(files, 1)
    plain = policy.texts(prompts, KEY)
    stir(policy, 1.0)
    tuned = policy.texts(prompts, KEY)
    assert tuned != plain
    policy.save(tmp_path / "weights")

    again = policy_of(folder, TextSettings(max_tokens=10, temperature=1e-4))
    again.load(tmp_path / "weights")
    assert again.texts(prompts, KEY) == tuned

    base = AutoModelForImageTextToText.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "weights").eval()
    inputs = policy._inputs(prompts.text[0], files[0])
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, policy.module(**inputs).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="does not fit this policy"):
        policy_of(folder, lora=LoraSettings(rank=2, alpha=2)).load(tmp_path / "weights")


def test_all_weights_are_saved_and_loaded(folder, files, tmp_path):
    policy = policy_of(folder, lora=LoraSettings(rank=0))
    with torch.no_grad():
        for p in policy.module.parameters():
            p.add_(0.05)
    policy.save(tmp_path)
    again = policy_of(folder, lora=LoraSettings(rank=0))
    again.load(tmp_path)
    for mine, theirs in zip(policy.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_the_language_model_is_trained(folder):
    trained = {name for name, p in policy_of(folder).module.named_parameters() if p.requires_grad}
    assert trained
    assert all("language_model" in name and ".lora_" in name for name in trained)


def test_a_model_that_does_not_see_is_refused(folder, files):
    policy = policy_of(folder)
    policy.check(asked(files))
    with torch.no_grad():
        for name, p in policy.module.named_parameters():
            if "multi_modal_projector" in name:
                p.zero_()
    with pytest.raises(ValueError, match="does not depend on the picture"):
        policy.check(asked(files))


def test_a_template_without_a_picture_is_refused(folder, files):
    policy = policy_of(folder)
    policy.adapter.processor.chat_template = "user {{ messages[0]['content'][1]['text'] }} assistant"
    with pytest.raises(ValueError, match="its processor cannot read a picture"):
        policy.sample(asked(files), Plan(1), KEY)


def test_a_prompt_without_a_picture_is_refused(folder, files):
    prompts = replace(asked(files), extra=[{}] * (3 * len(files)))
    with pytest.raises(ValueError, match="names no picture"):
        policy_of(folder).sample(prompts, Plan(1), KEY)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"max_tokens": 0}, "max_tokens"), ({"temperature": 0.0}, "temperature"), ({"top_p": 1.5}, "top_p")],
)
def test_settings_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        TextSettings(**wrong)


def test_a_folder_of_another_model_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a bert, which does not read pictures"):
        load(PolicySettings(str(tmp_path)), Noise())


# ---- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_half_precision_is_of_frozen_weights_and_of_forwards_alone(folder, files, precision, rank):
    exact, policy = (
        policy_of(folder, lora=LoraSettings(rank, 8), precision=name) for name in ("fp32", precision)
    )
    for one in (exact, policy):
        stir(one, 0.03)
    dtype, seen = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision]), []
    for (name, p), wanted in zip(policy.module.named_parameters(), exact.module.parameters(), strict=True):
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), name
        assert torch.equal(p, wanted) or not p.requires_grad, name
    layer = next(m for name, m in policy.module.named_modules() if name.endswith("q_proj"))
    layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    trajectory = policy.sample(asked(files), Plan(1), KEY)
    assert trajectory.log_prob.dtype == torch.float32
    (loss, found), (_, wanted) = (gradients(one, trajectory, 6) for one in (policy, exact))
    assert loss.dtype == torch.float32
    assert set(seen) == {dtype}
    off, size = (
        torch.cat([(found[name] * sign - wanted[name]).flatten() for name in wanted]).norm()
        for sign in (1, 0)
    )
    assert off < {"bf16": 0.06, "fp16": 0.015}[precision] * size
