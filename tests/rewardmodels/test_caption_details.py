"""Metrics of detailed captions: DCScore unit by unit, CAPTURE by scene graphs."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign.lab.captions import as_json, describe, draw_scene, write
from mmalign.records import Outcome
from mmalign.rewardmodels import caption_units, load
from mmalign.rewardmodels.caption_graph import (
    CaptionGraph,
    Embedded,
    Factual,
    capture,
    kind_score,
    no_synonyms,
    read_triples,
    synonymous,
    wordnet,
)
from mmalign.rewardmodels.caption_units import CaptionUnit, dc_score, facts_of, read_units, scored
from mmalign.rewardmodels.endpoint import Answer
from mmalign.rewardmodels.lab_graph import graph
from mmalign.testing import check_reward, prompts_of

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))


def outcome(captions, extra):
    return Outcome(prompts_of(["describe"] * len(captions), 1, extra), list(captions))


# ---- DCScore


def test_dcscore_is_that_of_its_definition_by_hand():
    """Ten units, eight verified; six of them tell five of twelve facts, one of these twice; two are new."""
    told = [CaptionUnit("", True, fact) for fact in (1, 2, 3, 4, 5, 5)]
    units = [
        *told,
        CaptionUnit("", True),
        CaptionUnit("", True),
        CaptionUnit("", False),
        CaptionUnit("", False),
    ]
    found = scored(units, 12)
    assert found.recall == pytest.approx((5 + 2) / (12 + 2))
    assert found.precision == pytest.approx(0.8)
    assert found.f1 == pytest.approx(0.6154, abs=1e-4)
    assert dc_score(units, 12) == pytest.approx(found.f1)


def test_what_only_comments_counts_in_one_half():
    units = [CaptionUnit("", True, 1), CaptionUnit("", False, None, describes=False)]
    assert dc_score(units, 1) == pytest.approx((2 / 3 + 1) / 2)


def test_true_details_that_nobody_listed_do_not_harm():
    units = [CaptionUnit("", True, 1)]
    richer = [*units, CaptionUnit("", True), CaptionUnit("", True)]
    assert dc_score(richer, 2) > dc_score(units, 2)
    wrong = [*units, CaptionUnit("", False)]
    assert dc_score(wrong, 2) < dc_score(units, 2)
    assert scored([], 3).f1 == scored([], 0).f1 == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.one_of(st.none(), st.integers(1, 4)), st.booleans()), max_size=8),
    st.integers(4, 6),
)
def test_scores_lie_in_0_to_1(rows, facts):
    units = [CaptionUnit("", *row) for row in rows]
    found = scored(units, facts)
    assert 0 <= found.precision <= 1
    assert 0 <= found.recall <= 1
    assert 0 <= dc_score(units, facts) <= 1


def test_a_whole_caption_of_a_lab_scene_is_worth_1_and_half_of_it_less():
    scenes = [draw_scene(random.Random(seed)) for seed in range(6)]
    whole = [write(describe(scene)) for scene in scenes]
    extra = [{"reference": text, "scene": as_json(scene)} for text, scene in zip(whole, scenes, strict=True)]
    reward = load("dcscore")
    full = reward(outcome(whole, extra)).values
    assert full.tolist() == [[1.0]] * 6
    part = [text[: len(text) // 2] for text in whole]
    assert (reward(outcome(part, extra)).values < full).all()
    check_reward(reward, outcome([*whole[:3], *part[3:]], extra))
    # A reference that tells less is an anchor, not the truth: the rest of a whole caption is new, and right.
    poor = [row | {"reference": text} for row, text in zip(extra, part, strict=True)]
    assert reward(outcome(whole, poor)).values.tolist() == [[1.0]] * 6


class Cutter:
    """A client that answers as it is told, in turn."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def ask(self, questions):
        found = []
        for question in questions:
            text = self.texts[len(self.asked) % len(self.texts)]
            self.asked.append(question)
            found.append(Answer(None, "dead") if text is None else Answer(text))
        return found


def told(*rows):
    return json.dumps([{"unit": "x", "describes": d, "fact": f, "right": r} for d, f, r in rows])


@pytest.fixture
def judged(monkeypatch, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    extra = [{"image": str(tmp_path / "a.png"), "reference": "A dog sleeps. It is brown."}]

    def ask(*texts, **more):
        client = Cutter(*texts)
        monkeypatch.setattr(caption_units, "open_client", lambda *_: client)
        reward = load("dcscore", judge="endpoint", model="m", url="http://localhost:1/v1", **more)
        return reward(outcome(["a brown dog"], extra)), client

    return ask


def test_a_model_is_shown_the_picture_the_facts_and_the_caption(judged):
    signal, client = judged("Sure: " + told((True, 1, True), (True, 2, True)))
    assert signal.values.tolist() == [[1.0]]
    content = client.asked[0].messages[0]["content"]
    assert content[0]["type"] == "image_url"
    assert "1. A dog sleeps.\n2. It is brown." in content[1]["text"]
    assert "a brown dog" in content[1]["text"]


def test_looks_are_averaged_and_answers_of_no_use_are_asked_again_and_then_missing(judged):
    signal, client = judged(told((True, 1, True), (True, 2, True)), told((True, 1, False)), looks=2)
    assert signal.values.tolist() == [[0.5]]
    assert {question.temperature for question in client.asked} == {0.7}
    signal, client = judged("no list", told((True, 1, True), (True, 2, True)))
    assert signal.values.tolist() == [[1.0]]
    for text in (None, "never"):
        signal, _ = judged(text)
        assert not signal.valid.any()
        assert signal.details[0]["missing"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("none", "no list of units"),
        ("[1,]", "is no JSON"),
        ('[{"unit": "x"}]', "says whether it describes and is right"),
        (told((True, 3, True)), "names a fact from 1 to 2, got 3"),
        (told((True, True, True)), "names a fact from 1 to 2, got True"),
    ],
)
def test_units_that_are_none_are_refused(answer, problem):
    with pytest.raises(ValueError, match=problem):
        read_units(answer, 2)


def test_facts_are_those_of_the_line_or_the_sentences_of_the_reference():
    assert facts_of({"facts": ["a", "b"]}, "C. D.") == ["a", "b"]
    assert facts_of({}, "A dog. It sleeps; a cat!") == ["A dog.", "It sleeps;", "a cat!"]
    with pytest.raises(ValueError, match="judge must be lab, endpoint or local"):
        load("dcscore", judge="oracle")


# ---- CAPTURE


def test_capture_weighs_the_kinds_as_published():
    assert capture({"objects": 0.8, "attributes": 0.6, "relations": 0.4}) == pytest.approx(0.65)
    assert capture({"objects": 0.8, "attributes": 0.6, "relations": None}) == pytest.approx(0.7)
    assert capture({"objects": None, "attributes": None, "relations": None}) == 0


def test_elements_are_matched_one_to_one_and_the_rest_softly():
    assert kind_score(["dog", "cat"], ["cat", "dog"], no_synonyms, None) == 1
    assert kind_score(["dog"], ["cat"], no_synonyms, None) == 0
    assert kind_score([], [], no_synonyms, None) is None
    assert kind_score(["dog"], [], no_synonyms, None) == 0
    # "red car" is in "car"; each car of the reference is taken once.
    assert kind_score(["car", "red car"], ["car"], no_synonyms, None) == pytest.approx(2 * 0.5 / 1.5)
    vectors = {"dog": [1.0, 0.0], "cat": [0.6, 0.8], "tree": [-1.0, 0.0]}

    def embed(texts):
        return torch.tensor([vectors[text] for text in texts])

    # dog pairs with dog; tree is left, cat is left: cosine -0.6 counts as 0.
    assert kind_score(["dog", "tree"], ["dog", "cat"], no_synonyms, embed) == pytest.approx(0.5)
    # precision (1 + .6) / 2 by the cat, recall (1 + .6) / 2
    assert kind_score(["cat", "tree"], ["tree", "dog"], no_synonyms, embed) == pytest.approx(0.8)


@settings(max_examples=30, deadline=None)
@given(st.permutations(["dog", "cat", "red car", "tree"]), st.permutations(["car", "cat", "house"]))
def test_the_order_of_elements_does_not_matter(ours, theirs):
    assert kind_score(ours, theirs, no_synonyms, None) == pytest.approx(
        2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    )


def test_triples_of_the_parser_are_objects_attributes_and_relations():
    found = read_triples(
        "( dog , is , Brown ) , ( dog , on , grass ) , ( broken , triple ) , ( grass , is , )"
    )
    assert found == CaptionGraph(
        frozenset({"dog", "grass"}), frozenset({"brown"}), frozenset({("dog", "on", "grass")})
    )
    assert read_triples("") == CaptionGraph()


def test_synonyms_are_those_of_wordnets_files(tmp_path):
    licence = "  1 This software and database is being provided\n"
    noun = "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a canid\n"
    adjective = "01382086 00 s 02 large(a) 0 big 0 000 | above average in size\n"
    for part, text in (("noun", noun), ("adj", adjective), ("verb", "")):
        (tmp_path / f"data.{part}").write_text(licence + text)
    same = wordnet(tmp_path)
    assert same("dog") == {"dog", "domestic dog", "canis familiaris"}
    assert synonymous("large", "big", same)
    assert not synonymous("large", "small", same)
    assert synonymous("police car", "car", no_synonyms)
    assert not synonymous("car", "carpet", no_synonyms)
    with pytest.raises(ValueError, match=r"has no data\.noun"):
        wordnet(tmp_path / "absent")


def test_captions_of_the_lab_are_read_by_their_words():
    found = graph(
        "There are two rings and a large red circle. The red circle is left of the small blue star."
    )
    assert found.objects == {"ring", "circle", "star"}
    assert found.attributes == {"large", "red", "small", "blue"}
    assert found.relations == {("circle", "left of", "star")}


def test_a_caption_equal_to_its_reference_is_worth_1():
    texts = [write(describe(draw_scene(random.Random(seed)))) for seed in range(8)]
    reward = load("capture")
    extra = [{"reference": text} for text in texts]
    assert reward(outcome(texts, extra)).values.tolist() == [[1.0]] * 8
    other = reward(outcome(texts[1:] + texts[:1], extra))
    assert (other.values < 1).all()
    check_reward(reward, outcome(texts[1:] + texts[:1], extra))
    several = [{"references": [text, "a green cross"]} for text in texts]
    both = reward(outcome(texts, several)).values
    alone = reward(outcome(texts, [{"reference": "a green cross"}] * 8)).values
    assert torch.allclose(both, (1 + alone) / 2)
    assert not reward(outcome(["a red circle"], [{}])).valid.any()


def test_any_t5_and_any_sentence_model_of_the_library_take_part(tmp_path):
    """Random weights of the real classes: what a user's folders are loaded through."""
    from families import t5
    from transformers import BertConfig, BertModel, BertTokenizerFast, T5Config, T5ForConditionalGeneration

    from mmalign.testing import _t5_tokenizer

    assert t5
    tokens = _t5_tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokens),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokens.save_pretrained(tmp_path / "t5")
    parser = Factual(str(tmp_path / "t5"), batch=2)
    one, two = parser(["a red cat. two dogs."]), parser(["a red cat.", "two dogs."])
    assert one[0] == two[0].joined(two[1])
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "cat"])
    )
    bert = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(bert).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    embed = Embedded(str(tmp_path / "bert"))
    found = embed(["dog", "cat", "dog"])
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    assert torch.allclose(found[0], found[2], atol=1e-6)
    for wrong, message in (
        ({"parser": "no/such/folder"}, "parser"),
        ({"likeness": "no/such/folder"}, "likeness"),
    ):
        reward = load("capture", **wrong)
        with pytest.raises(ValueError, match=f"capture: {message} no/such/folder does not load"):
            reward(outcome(["a red circle", "x"], [{"reference": "a blue star"}] * 2))
