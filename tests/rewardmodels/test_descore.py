"""DeScore on tiny models with random weights, of families that take videos and of one that takes pictures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from mmalign import descore_training
from mmalign.descore_training import (
    PAIRS,
    ColdStart,
    DualRL,
    Student,
    accuracy,
    calibrated,
    cold_start,
    dual_loss,
    dual_rl,
    evaluated,
    hidden_pairs,
    judged,
    laid_out,
    length_reward,
    likely,
    look,
    parts,
    preference_loss,
    read_pairs,
    roll,
    thought_reward,
)
from mmalign.pictures import Clip
from mmalign.records import Outcome
from mmalign.rewardmodels import load
from mmalign.rewardmodels.descore import (
    ADAPTER,
    ADAPTER_SAID,
    HEAD,
    SAID,
    Thinker,
    ThinkerSettings,
    Thought,
    answer_of,
)
from mmalign.testing import check_reward, prompts_of

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from captioners import FAMILIES as CAPTIONERS
from captioners import tiny_captioner, tiny_llava

PROMPTS = ["a red dog", "two cat on the hat"]
THOUGHT = "the dog left a red hat"
FAMILIES = ("Llava", *sorted(CAPTIONERS.keys() - {"PaliGemma"}))  # which has no chat template


def family(name: str, folder: Path) -> str:
    return str(tiny_llava(folder) if name == "Llava" else tiny_captioner(name, folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return {name: family(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def settings(model: str) -> ThinkerSettings:
    return ThinkerSettings(model, "describe the picture {prompt}", frames=4, longest=6)


def videos(seed: int = 0, count: int = 2, length: int = 4) -> Tensor:
    media = torch.rand(count, length, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (media * 255).round() / 255


@pytest.fixture(scope="module")
def judges(models) -> dict[str, Thinker]:
    return {name: Thinker(settings(model)) for name, model in models.items()}


@pytest.fixture(params=FAMILIES)
def judge(request, judges) -> Thinker:
    return judges[request.param]


def asked(judge: Thinker, media: Tensor) -> list:
    return [judge.encode(video, prompt) for video, prompt in zip(media, PROMPTS, strict=True)]


@torch.no_grad()
def score(judge: Thinker, thoughts: list[str], media: Tensor | None = None) -> list[float]:
    given = [judge.spell(text) for text in thoughts]
    return judge.read(asked(judge, videos() if media is None else media), given).score.tolist()


# ---- the score


def test_the_score_is_a_linear_map_of_the_state_at_the_token_after_the_thought(judge):
    """By one plain forward of a video, its prompt, the thought and the token, without padding."""
    for video, prompt, text, found in zip(
        videos(), PROMPTS, [THOUGHT, ""], score(judge, [THOUGHT, ""]), strict=True
    ):
        inputs = dict(judge.encode(video, prompt))
        tail = torch.tensor([[*judge.spell(text), judge.token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(tail)], 1)
        with torch.no_grad():
            state = judge.network(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        assert found == pytest.approx(float(judge.head.weight[0] @ state), abs=1e-4)


def test_the_score_depends_on_the_thought_and_on_the_video(judge):
    told = score(judge, [THOUGHT] * 2)
    permuted = score(judge, [" ".join(reversed(THOUGHT.split()))] * 2)
    none = score(judge, [""] * 2)
    other = score(judge, [THOUGHT] * 2, videos(seed=1))
    for first, *others in zip(told, permuted, none, other, strict=True):
        assert all(abs(first - one) > 1e-4 for one in others)


def test_the_head_has_no_bias(judge):
    assert judge.head.bias is None
    assert judge.head.weight.shape == (1, judge.network.get_input_embeddings().weight.shape[1])


def test_thoughts_are_those_of_generate_and_never_hold_the_token(judge):
    """Greedy, and the same alone as beside a longer question."""
    both = judge.think(asked(judge, videos()))
    assert both == judge.think(asked(judge, videos()))
    for one, thought in zip(asked(judge, videos()), both, strict=True):
        found = judge.network.generate(
            **one, do_sample=False, max_new_tokens=6, suppress_tokens=judge.banned
        )[0, one["input_ids"].shape[1] :].tolist()
        wanted = [*thought.tokens, *([thought.end] if thought.end is not None else [])]
        assert found[: len(wanted)] == wanted
        assert judge.think([one]) == [thought]
        assert not {*thought.tokens} & {*judge.banned, *judge.ends}
    with pytest.raises(ValueError, match="holds '<Reward>', which no thought may hold"):
        judge.spell("a dog <Reward>")


def test_log_probs_along_a_thought_are_those_of_a_plain_forward(judge):
    thoughts = judge.think(asked(judge, videos()), temperature=1.0, seed=3)
    token, mask = descore_training.laid_out(thoughts, torch.device("cpu"))
    with torch.no_grad():
        found, _ = likely(judge, asked(judge, videos()), thoughts, token)
        for row, one in enumerate(asked(judge, videos())):
            count = int(mask[row].sum())
            inputs = dict(one)
            tail = token[row : row + 1, :count]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.zeros_like(tail)], 1)
            logits = judge.network(**inputs).logits[0, -count - 1 : -1].float()
            logits[:, judge.banned] = -math.inf
            wanted = logits.log_softmax(-1)[torch.arange(count), tail[0]]
            assert torch.allclose(found[row, :count], wanted, atol=1e-4)


def test_thoughts_are_drawn_from_the_plain_distribution_whatever_the_model_prefers(models, tmp_path):
    """Penalties and cuts of a generation_config are left aside, and any token that ends a text ends them."""
    plain = Thinker(settings(models["Llava"]))
    one = asked(plain, videos())
    plain.network.save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    ending = plain.think(one)[0].tokens[2]
    words = {"eos_token_id": [plain.ends[0], ending], "pad_token_id": plain.pad}
    cuts = {"do_sample": True, "top_k": 1, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    T.GenerationConfig(**words, **cuts).save_pretrained(tmp_path)
    other = Thinker(settings(str(tmp_path)))
    greedy = plain.think(one)[0].tokens
    cut = greedy.index(ending)
    assert other.think(one)[0] == Thought(greedy[:cut], ending)
    drawn = {thought.tokens for seed in range(8) for thought in other.think(one[:1], 1.0, seed)}
    assert len(drawn) > 1


def test_a_given_thought_ends_as_a_turn_does_and_not_by_another_token_that_may_end_a_text(models, tmp_path):
    """As in Qwen3-VL, whose generation_config also names <|endoftext|>, of a lower number."""
    plain = Thinker(settings(models["Llava"]))
    lower = plain.end - 1
    plain.network.save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    T.GenerationConfig(eos_token_id=[plain.end, lower]).save_pretrained(tmp_path)
    other = Thinker(settings(str(tmp_path)))
    assert (other.ends, other.end) == ([lower, plain.end], plain.end)


# ---- the formulas


def test_the_loss_is_that_of_bradley_and_terry_and_knows_only_the_gap():
    chosen, rejected = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.0, 0.5, 2.0])
    tie = torch.tensor([False, False, True])
    found = preference_loss(chosen, rejected, tie).tolist()
    assert found == pytest.approx([-math.log(1 / (1 + math.exp(-1))), -math.log(1 / (1 + math.e)), 0.0])
    assert torch.allclose(
        preference_loss(chosen + 7, rejected + 7, tie), preference_loss(chosen, rejected, tie)
    )
    margin = preference_loss(chosen, rejected, tie, "margin").tolist()
    assert margin == pytest.approx([math.log(1 + math.exp(g)) for g in (-0.43, 1.57)] + [0.0])


def test_the_loss_that_knows_ties_is_the_likelihood_of_rao_and_kupper():
    """With k = 5, P(win) = e / (e + k) at e = exp(gap), and P(tie) = (k^2 - 1) e / ((e + k) (1 + k e))."""
    gap, k = 0.7, 5.0
    e = math.exp(gap)
    win, tie = preference_loss(
        torch.full((2,), gap), torch.zeros(2), torch.tensor([False, True]), "tie_aware"
    )
    assert win.item() == pytest.approx(-math.log(e / (e + k)), abs=1e-5)
    wanted = -math.log((k**2 - 1) * e / ((e + k) * (1 + k * e)))
    assert tie.item() == pytest.approx(wanted + math.log(k**2 - 1), abs=1e-5)


def test_ties_have_no_gradient():
    chosen = torch.tensor([0.3, 0.4], requires_grad=True)
    preference_loss(chosen, torch.zeros(2), torch.tensor([True, False])).sum().backward()
    assert chosen.grad[0] == 0
    assert chosen.grad[1] == pytest.approx(-1 / (1 + math.exp(0.4)))


def test_length_is_paid_in_steps():
    found = [length_reward(n) for n in (0, 499, 500, 1000, 1499, 1500, 1999, 2000, 9000)]
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.4, 0.6, 0.6, 1, 1])
    assert length_reward(30, step=10) == pytest.approx(0.6)


def test_a_thought_is_worth_its_right_dimensions_its_form_and_its_length():
    plain = "it moves. <answer>appearance: 1, direction: 0</answer>"
    as_json = '<answer>{"dimensional_scores": {"appearance": 1, "direction": 0}}</answer>'
    for text in (plain, as_json):
        assert answer_of(text) == {"appearance": 1, "direction": 0}
    assert answer_of("appearance: 1") is None
    assert answer_of("<answer>a: 10, b: 3.5, c: -2, d: 4.</answer>") == {"a": 10, "c": -2, "d": 4}
    label = {"appearance": 1, "direction": 1}
    assert accuracy(answer_of(plain), label) == 0.5
    assert thought_reward(plain, label) == pytest.approx(0.7 * 0.5 + 0.1)
    assert thought_reward(plain + "x" * 500, label) == pytest.approx(0.7 * 0.5 + 0.1 + 0.2 * 0.2)
    assert thought_reward("no answer", label) == 0.0


def test_reasoning_is_hidden_from_half_of_the_pairs():
    draws = torch.Generator().manual_seed(0)
    hidden = hidden_pairs(4000, 0.5, draws)
    assert abs(sum(hidden) / 4000 - 0.5) < 4 * math.sqrt(0.25 / 4000)
    assert not any(hidden_pairs(50, 0.0, draws))
    assert all(hidden_pairs(50, 1.0, draws))


# ---- pairs and training


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory) -> Path:
    """Bright videos are chosen over dark ones; the third pair is a tie."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(4):
        row: dict[str, object] = {"prompt": PROMPTS[i % 2], "tie": i == 2, "kind": "bright" if i != 2 else ""}
        for name, tone, text in (("chosen", 230, "a red dog"), ("rejected", 30, "two blue cat left")):
            place = folder / f"{i}_{name}"
            place.mkdir()
            for f in range(3):
                Image.new("RGB", (16, 16), (tone, 5 * i, 9 * f)).save(place / f"{f}.png")
            row[name] = {"video": place.name, "reasoning": text, "scores": {"appearance": int(tone > 99)}}
        rows.append(json.dumps(row))
    (folder / PAIRS).write_text("\n".join(rows))
    return folder


def student_of(model: str) -> Student:
    return Student(Thinker(settings(model)), rank=4, alpha=8)


@pytest.fixture(scope="module")
def cold(models, pairs_folder, tmp_path_factory) -> tuple[Student, list[dict[str, float]], Path]:
    student, rows = student_of(models["Llava"]), []
    cold_start(student, read_pairs(pairs_folder), ColdStart(steps=30, batch=4, lr=1e-2), rows.append)
    folder = tmp_path_factory.mktemp("cold")
    student.save(folder)
    return student, rows, folder


def test_the_cold_start_learns_the_preference_both_ways(cold, pairs_folder):
    student, rows, _ = cold
    assert rows[-1]["loss"] < 0.1 < rows[0]["loss"]
    found = evaluated(student.judge, read_pairs(pairs_folder))
    assert found["bright"]["direct"] == 1.0
    assert found["bright"]["pairs"] == 3
    given = next([pair.chosen.reasoning, pair.rejected.reasoning] for pair in read_pairs(pairs_folder))
    judge = student.judge
    first = student.asked(read_pairs(pairs_folder)[:1])
    chosen, rejected = judge.read(first, [judge.spell(text) for text in given]).score
    assert chosen > rejected


def test_given_reasoning_grows_likelier_where_words_count(models, pairs_folder):
    pairs = read_pairs(pairs_folder)

    def surprise_of(words: float) -> tuple[float, list[dict[str, float]]]:
        student, rows = student_of(models["Llava"]), []
        cold_start(student, pairs, ColdStart(steps=12, batch=4, lr=1e-2, hide=0.5, words=words), rows.append)
        judge = student.judge
        given = [Thought(judge.spell(side.reasoning), judge.end) for pair in pairs for side in pair.sides]
        token, mask = laid_out(given, torch.device("cpu"))
        with torch.no_grad():
            log_prob, _ = likely(judge, student.asked(pairs), given, token)
        return -log_prob[mask].mean().item(), rows

    without, plain = surprise_of(0.0)
    learned, rows = surprise_of(1.0)
    assert learned < without - 0.3
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"])  # it comes beside the preference
    assert "surprise" not in plain[0]


def test_words_count_in_the_mean_over_tokens_whatever_the_parts(models, pairs_folder):
    pairs, found = read_pairs(pairs_folder), []
    for chunk in (1, 4):
        student, rows = student_of(models["Llava"]), []
        settings_ = ColdStart(steps=1, batch=4, chunk=chunk, hide=0.0, words=2.0, lr=1e-2)
        cold_start(student, pairs, settings_, rows.append)
        found.append((rows[0], [parameter.detach().clone() for parameter in student.learned]))
    (whole, first), (parted, second) = found
    assert whole["surprise"] == pytest.approx(parted["surprise"], rel=1e-5)
    assert whole["norm"] == pytest.approx(parted["norm"], rel=1e-4)
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_only_one_embedding_row_changes_in_the_cold_start(cold, models):
    student, _, _ = cold
    fresh = Thinker(settings(models["Llava"]))
    assert torch.equal(
        fresh.network.get_input_embeddings().weight, student.judge.network.get_input_embeddings().weight
    )
    ids = torch.arange(len(fresh.processor.tokenizer))[None]
    before, after = (j.network.get_input_embeddings()(ids)[0] for j in (fresh, student.judge))
    changed = (before != after).any(1).nonzero()[:, 0].tolist()
    assert changed == [fresh.token]


def test_what_sees_and_what_is_not_adapted_stays_as_it_was(cold, models):
    student, _, _ = cold
    fresh = dict(Thinker(settings(models["Llava"])).network.named_parameters())
    for name, p in student.judge.network.named_parameters():
        if ".lora_" in name:
            assert "vision" not in name
            assert p.abs().sum() > 0
        else:
            assert torch.equal(p, fresh[name.replace(".base_layer", "")])


def test_both_videos_of_a_pair_are_seen_with_reasoning_or_without(models, pairs_folder, monkeypatch):
    student, seen = student_of(models["Llava"]), []
    read = student.judge.read
    monkeypatch.setattr(student.judge, "read", lambda a, t, **k: (seen.append(list(t)), read(a, t, **k))[1])
    cold_start(student, read_pairs(pairs_folder), ColdStart(steps=8, batch=4, lr=1e-4))
    shown = [[bool(thought) for thought in thoughts] for thoughts in seen]
    assert all(row[i] == row[i + 1] for row in shown for i in range(0, len(row), 2))
    assert {one for row in shown for one in row} == {True, False}


def test_a_video_of_two_pairs_is_read_with_the_reasoning_of_each(models, pairs_folder, monkeypatch):
    first, second, *_ = read_pairs(pairs_folder)
    other = replace(first.chosen, reasoning="the hat")
    again = replace(second, chosen=other, rejected=first.rejected)
    student, seen = student_of(models["Llava"]), []
    read = student.judge.read
    monkeypatch.setattr(student.judge, "read", lambda a, t, **k: (seen.extend(t), read(a, t, **k))[1])
    cold_start(student, [first, again], ColdStart(steps=1, batch=2, hide=0.0))
    wanted = [side.reasoning for pair in (first, again) for side in pair.sides]
    assert sorted(map(student.judge.words, seen)) == sorted(wanted)


def test_reasoning_on_one_video_of_a_pair_alone_is_refused(models, pairs_folder):
    first, *rest = read_pairs(pairs_folder)
    odd = replace(first, rejected=replace(first.rejected, reasoning=""))
    with pytest.raises(ValueError, match="reasoning on both videos or on none, and 'a red dog' on one"):
        cold_start(student_of(models["Llava"]), [odd, *rest], ColdStart(steps=1))
    bare = replace(odd, chosen=replace(odd.chosen, reasoning=""))
    with pytest.raises(ValueError, match="no pair has any"):
        cold_start(student_of(models["Llava"]), [bare], ColdStart(steps=1))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_goes_on_exactly(stage, models, cold, pairs_folder, tmp_path):
    pairs = read_pairs(pairs_folder)
    if stage == 1:
        run, settings_ = cold_start, ColdStart(steps=5, batch=3, lr=1e-2, save_every=2)
    else:
        run, settings_ = dual_rl, DualRL(4, batch=2, rollouts=2, lr=1e-2, length_step=5, save_every=2)

    def fresh() -> Student:
        return student_of(models["Llava"]) if stage == 1 else Student.load(cold[2])

    def killed(row: dict[str, float]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    whole, rows = fresh(), []
    run(whole, pairs, settings_, rows.append)
    with pytest.raises(KeyboardInterrupt):
        run(fresh(), pairs, settings_, killed, tmp_path)
    for _ in range(2):  # the second time there is nothing left to do
        again, told = fresh(), []
        run(again, pairs, settings_, told.append, tmp_path)
        assert repr(told) == repr(rows)  # nan equals nan
        assert all(torch.equal(a, b) for a, b in zip(again.learned, whole.learned, strict=True))
    with pytest.raises(ValueError, match=r"training.pt: was begun with other lr: use another --out"):
        run(fresh(), pairs, replace(settings_, lr=1e-3), folder=tmp_path)
    with pytest.raises(ValueError, match="was begun with other pairs"):
        run(fresh(), pairs[:3], settings_, folder=tmp_path)
    with torch.no_grad():
        (other := fresh()).learned[0].add_(1.0)
    with pytest.raises(ValueError, match="was begun with other weights"):
        run(other, pairs, settings_, folder=tmp_path)


def test_a_video_file_is_shown_by_the_frames_that_the_reward_shows(judges, tmp_path, monkeypatch):
    whole = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(2)).mul(255).round() / 255
    about = VideoMetadata(total_num_frames=10, fps=5.0)

    def decoded(file: str, backend: str, sample_indices_fn) -> tuple:
        shown = whole[sample_indices_fn(metadata=about)]
        return (shown * 255).round().byte().permute(0, 2, 3, 1).numpy(), about

    monkeypatch.setattr("transformers.video_utils.load_video", decoded)
    monkeypatch.setattr("mmalign.pipelines.videos.find_spec", lambda package: True)
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"ten frames")
    judge = judges["Llava"]
    read = look(judge, "a red dog", Clip(str(file)))["pixel_values"]
    assert torch.equal(read, judge.encode(whole, "a red dog")["pixel_values"])


def test_the_reward_scores_as_the_student_did_and_peft_reads_its_adapter(cold, models):
    from peft import PeftModel

    student, _, folder = cold
    merged = Thinker.load(str(folder))
    assert score(merged, [THOUGHT, ""]) == pytest.approx(score(student.judge, [THOUGHT, ""]), abs=1e-4)
    plain = Thinker(settings(models["Llava"]))
    plain.take(folder)
    assert abs(score(plain, [THOUGHT, ""])[0] - score(merged, [THOUGHT, ""])[0]) > 1e-3
    network = T.AutoModelForImageTextToText.from_pretrained(models["Llava"])
    network.resize_token_embeddings(len(plain.processor.tokenizer), mean_resizing=False)
    plain.network = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    plain.network.get_input_embeddings().register_forward_hook(plain._own_row)
    assert score(plain, [THOUGHT, ""]) == pytest.approx(score(merged, [THOUGHT, ""]), abs=1e-4)


def test_training_goes_on_from_what_was_saved(cold):
    student, _, folder = cold
    again = Student.load(folder)
    assert score(again.judge, [THOUGHT, ""]) == pytest.approx(score(student.judge, [THOUGHT, ""]), abs=1e-5)
    assert all(torch.equal(p, again.adapter[name]) for name, p in student.adapter.items())


def rolled_of(folder: Path, pairs: Path, dual: DualRL) -> tuple[Student, descore_training.Rolled]:
    student = Student.load(folder)
    return student, roll(student, read_pairs(pairs)[:2], dual, seed=5)


def test_thoughts_on_one_video_are_compared_with_each_other(cold, pairs_folder):
    _, _, folder = cold
    student, rolled = rolled_of(folder, pairs_folder, DualRL(rollouts=4, length_step=5))
    reward = torch.tensor(
        [
            0.2 * length_reward(len(student.judge.words(thought.tokens)), 5)
            for thought in rolled.thoughts  # random words: no answer, so that length alone counts
        ]
    ).reshape(4, 4)
    assert reward.std() > 0
    wanted = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, correction=0, keepdim=True) + 1e-4)
    assert torch.allclose(rolled.advantage.reshape(4, 4), wanted, atol=1e-4)
    assert rolled.take(slice(1, 2)).thoughts == rolled.thoughts[8:]


def test_before_the_first_update_the_ratio_is_one_and_nothing_pulls(cold, pairs_folder):
    _, _, folder = cold
    dual = DualRL(rollouts=4, length_step=5, kl=0.1)
    student, rolled = rolled_of(folder, pairs_folder, dual)
    _, measures = dual_loss(student.judge, rolled, rolled.old, dual, rolled)
    assert measures["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert measures["kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_head_learns_by_the_preference_alone_with_its_weight(cold, pairs_folder):
    """d L / d w = weight * mean over pairs and rollouts of -sigmoid(-gap) (h+ - h-)."""
    _, _, folder = cold
    dual = DualRL(rollouts=4, length_step=5)
    student, rolled = rolled_of(folder, pairs_folder, dual)
    judge, states = student.judge, []
    hook = judge.head.register_forward_hook(lambda module, given, out: states.append(given[0].detach()))
    loss, _ = dual_loss(judge, rolled, rolled.old, dual, rolled)
    hook.remove()
    loss.backward()
    chosen, rejected = states[0].reshape(2, 2, 4, -1).unbind(1)
    gap = (chosen - rejected) @ judge.head.weight[0].detach()
    wanted = -5e-3 * (torch.sigmoid(-gap)[..., None] * (chosen - rejected)).mean((0, 1))
    assert torch.allclose(judge.head.weight.grad[0], wanted, atol=1e-6)


def test_a_step_makes_better_thoughts_likelier(cold, pairs_folder):
    _, _, folder = cold
    dual = DualRL(rollouts=8, length_step=5, weight=0.0, kl=0.0)
    student, rolled = rolled_of(folder, pairs_folder, dual)
    optimizer = torch.optim.SGD(student.learned, 0.05)
    loss, _ = dual_loss(student.judge, rolled, None, dual, rolled)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        now, _ = likely(student.judge, rolled.asked, rolled.thoughts, rolled.token)
    gained = (torch.where(rolled.mask, now - rolled.old, 0.0) * rolled.advantage[:, None]).sum()
    assert gained > 0


def gradients(student: Student) -> list[Tensor]:
    found = [p.grad for p in student.learned]
    for p in student.learned:
        p.grad = None
    return found


def test_parts_of_a_batch_have_its_gradient(models, cold, pairs_folder):
    """Pairs of unlike length, with a tie, in parts of one and of all."""
    pairs, runs = read_pairs(pairs_folder), []
    for chunk in (1, 4):
        student, rows = student_of(models["Llava"]), []
        cold_start(student, pairs, ColdStart(steps=3, batch=4, lr=1e-2, chunk=chunk), rows.append)
        runs.append((student, rows))
    for a, b in zip(*(student.learned for student, _ in runs), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert runs[0][1][0] == pytest.approx(runs[1][1][0], abs=1e-4)
    dual = DualRL(rollouts=4, length_step=5, kl=0.1)
    student = Student.load(cold[2])
    rolled = roll(student, [pairs[0], pairs[2]], dual, seed=5)
    dual_loss(student.judge, rolled, rolled.old, dual, rolled)[0].backward()
    wanted = gradients(student)
    for part in parts(2, 1):
        some = rolled.take(part)
        dual_loss(student.judge, some, some.old, dual, rolled)[0].backward()
    for a, b in zip(gradients(student), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_layers_that_are_computed_twice_have_the_same_gradient(judge, models):
    """And the same thoughts: what is drawn keeps its cache."""
    given = [judge.spell(THOUGHT), ()]
    student = Student(Thinker(judge.settings), rank=2, alpha=4)
    for name, p in student.adapter.items():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    own, question, calls = student.judge, asked(judge, videos()), []
    layer = next(part for name, part in own.network.named_modules() if name.endswith("q_proj.lora_A.default"))
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def step() -> tuple[list[Tensor], int]:
        calls.clear()
        own.read(question, given).score.square().sum().backward()
        return gradients(student), len(calls)

    plain, once = step()
    thoughts = own.think(question, 1.0, 3)
    own.checkpoint_gradients()
    again, twice = step()
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert own.think(question, 1.0, 3) == thoughts
    assert not own.network.training


def test_a_frozen_base_in_bf16_has_adapters_and_a_head_in_fp32(models, cold, pairs_folder):
    student = Student(Thinker(settings(models["Llava"]), "bf16"), rank=4, alpha=8)
    assert student.judge.network.dtype == torch.bfloat16
    assert {p.dtype for p in student.learned} == {torch.float32}
    rows: list[dict[str, float]] = []
    cold_start(student, read_pairs(pairs_folder), ColdStart(steps=20, batch=4, lr=1e-2), rows.append)
    assert rows[-1]["loss"] < 0.3 < rows[0]["loss"]
    whole, half = (Student.load(cold[2], precision=precision) for precision in ("fp32", "bf16"))
    assert score(half.judge, [THOUGHT, ""]) == pytest.approx(score(whole.judge, [THOUGHT, ""]), abs=0.1)
    assert score(half.judge, [THOUGHT, ""]) != score(whole.judge, [THOUGHT, ""])


@pytest.mark.slow
def test_dual_rl_earns_more(cold, pairs_folder):
    _, _, folder = cold
    student, rows = Student.load(folder), []
    dual = DualRL(steps=12, batch=4, rollouts=6, minibatch=2, lr=1e-2, length_step=5)
    dual_rl(student, read_pairs(pairs_folder), dual, rows.append)
    assert sum(row["reward"] for row in rows[-3:]) > 1.15 * sum(row["reward"] for row in rows[:3])
    assert rows[-1]["kl"] > 0


def test_pairs_that_cannot_be_read_are_named(tmp_path, models):
    with pytest.raises(ValueError, match=r"has no pairs.jsonl; scripts/descore.py pairs writes one"):
        read_pairs(tmp_path)
    (tmp_path / PAIRS).write_text(
        '{"prompt": "a", "chosen": {"video": "gone"}, "rejected": {"video": "gone"}}\n'
    )
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: needs a prompt.*there is no video"):
        read_pairs(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    side = {"video": ".", "scores": {"appearance": 0.7}}
    (tmp_path / PAIRS).write_text(json.dumps({"prompt": "a", "chosen": side, "rejected": side}))
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: .*a whole number for each dimension, got .*0\.7"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="words must be 0 or more, got -1"):
        ColdStart(words=-1)
    with pytest.raises(ValueError, match=r"hide and warmup lie in 0\.\.1, got 2"):
        ColdStart(hide=2)
    with pytest.raises(ValueError, match="rollouts are compared with each other: 2 or more, got 1"):
        DualRL(rollouts=1)
    with pytest.raises(ValueError, match="cold start: save_every must be above 0, got 0"):
        ColdStart(save_every=0)


# ---- the reward


@pytest.fixture(scope="module")
def weights(cold, pairs_folder) -> str:
    student, _, folder = cold
    calibrated(student.judge, read_pairs(pairs_folder))
    student.save(folder)
    return str(folder)


def outcome(media: Tensor | None = None) -> Outcome:
    return Outcome(prompts_of(PROMPTS, 1), videos() if media is None else media)


def test_the_reward_thinks_then_scores_and_standardizes(weights):
    reward = load("descore", weights=weights)
    found, judge = reward(outcome()), Thinker.load(weights)
    thoughts = [judge.words(thought.tokens) for thought in judge.think(asked(judge, videos()))]
    assert [detail["reasoning"] for detail in found.details] == thoughts
    (mean, std), (direct_mean, direct_std) = judge.settings.scale
    wanted = [(raw - mean) / std for raw in score(judge, thoughts)]
    assert found.values[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)
    direct = load("descore", weights=weights, think=False)(outcome())
    wanted = [(raw - direct_mean) / direct_std for raw in score(judge, ["", ""])]
    assert direct.values[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)
    assert direct.details[0]["reasoning"] == ""


def test_the_scale_is_that_of_the_pairs(weights, pairs_folder):
    judge = Thinker.load(weights)
    rows = [one for both in judged(judge, read_pairs(pairs_folder)) for one in both]
    values = torch.tensor([one.thought for one in rows], dtype=torch.float64)
    assert judge.settings.scale[0] == pytest.approx(
        (values.mean().item(), values.std(correction=0).item()), abs=1e-4
    )


def test_the_reward_keeps_the_contract(weights):
    check_reward(load("descore", weights=weights, batch=1), outcome())
    check_reward(load("descore", weights=weights, think=False), outcome())


def test_a_score_is_the_same_every_time_and_a_video_is_thought_about_once(weights, monkeypatch):
    reward, asked_for = load("descore", weights=weights, cached=2), []
    think = reward._judge.think
    monkeypatch.setattr(reward._judge, "think", lambda a: (asked_for.append(len(a)), think(a))[1])
    first = reward(outcome())
    assert torch.equal(first.values, reward(outcome()).values)
    assert asked_for == [2]
    reward(outcome(videos(seed=1)))  # drives the others out of the cache
    assert torch.equal(first.values, load("descore", weights=weights)(outcome()).values)
    assert torch.equal(first.values, reward(outcome()).values)
    assert asked_for == [2, 2, 2]


def test_long_videos_are_shown_by_frames_from_end_to_end(weights):
    reward = load("descore", weights=weights, think=False)
    long = videos(length=10)
    assert torch.equal(reward(outcome(long)).values, reward(outcome(long[:, [0, 3, 6, 9]])).values)


def test_what_cannot_be_is_refused_with_its_mend(weights, models, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*descore.json; scripts/descore.py train writes one"):
        load("descore", weights=str(tmp_path))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        load("descore", weights=weights, batch=0)
    with pytest.raises(ValueError, match=r"descore: model .*nowhere does not load"):
        load("descore", weights=weights, model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"the instruction must hold \{prompt\} once"):
        replace(settings(models["Llava"]), instruction="judge it")
    for name in (SAID, HEAD):
        (tmp_path / name).write_bytes((Path(weights) / name).read_bytes())
    from safetensors.torch import load_file, save_file

    state = load_file(Path(weights) / HEAD)
    save_file({**state, "weight": state["weight"][:, :5].contiguous()}, tmp_path / HEAD)
    with pytest.raises(ValueError, match=r"needs 'weight' of shape \(1, 32\)"):
        load("descore", weights=str(tmp_path))
    for name in (HEAD, ADAPTER):
        (tmp_path / name).write_bytes((Path(weights) / name).read_bytes())
    with pytest.raises(ValueError, match=f"has no {ADAPTER_SAID}"):
        load("descore", weights=str(tmp_path))
