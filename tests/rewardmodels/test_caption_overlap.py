"""BLEU, ROUGE-L, CIDEr-D and METEOR of captions: by hand, and by properties that they must have."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.records import Outcome
from mmalign.rewardmodels import load
from mmalign.rewardmodels.caption_overlap import (
    bleu,
    cider_d,
    common,
    database,
    meteor,
    overlap,
    rarity,
    rouge_l,
    words,
)
from mmalign.testing import check_reward, prompts_of

SAID, KNOWN = ["a", "cat", "on", "the", "mat"], ["the", "cat", "is", "on", "the", "mat"]
TEXT = st.lists(st.sampled_from(["a", "cat", "dog", "on", "the", "mat"]), min_size=5, max_size=9)


def test_words_are_lower_case_and_without_marks():
    assert words("A dog's toy, two (red) cats.") == ["a", "dog's", "toy", "two", "red", "cats"]


def test_bleu_by_hand():
    brevity = math.exp(1 - 6 / 5)
    assert bleu(SAID, [KNOWN], 1) == pytest.approx(brevity * 4 / 5)
    # on the, the mat of four pairs; on the mat of three; none of two: 1 is added for more than one word.
    assert bleu(SAID, [KNOWN], 4) == pytest.approx(brevity * (4 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_counts_are_clipped_by_the_reference_that_has_most():
    said = ["the", "the", "the", "the"]
    assert bleu(said, [["the", "cat", "the", "mat"], ["the", "dog", "a", "b"]], 1) == pytest.approx(2 / 4)


def test_the_reference_nearest_in_length_counts_the_shorter_of_two():
    said = ["a", "b", "c", "d"]
    assert bleu(said, [["a", "b", "c"], ["a", "b", "c", "d", "e"]], 1) == pytest.approx(1)
    assert bleu(said, [["a", "b", "c", "d", "e"]], 1) == pytest.approx(math.exp(1 - 5 / 4))


def test_rouge_l_by_hand():
    assert common(SAID, KNOWN) == 4
    p, r = 4 / 5, 4 / 6
    assert rouge_l(SAID, [KNOWN]) == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))


def test_cider_d_by_hand():
    """Three lines; a word in all of them weighs nothing, a word in one weighs log 3."""
    rare = rarity([["a red dog"], ["a red cat"], ["a blue cat"]])
    assert rare["a",] == 0
    assert rare["red",] == pytest.approx(math.log(3 / 2))
    assert rare["blue", "cat"] == rare[()] == pytest.approx(math.log(3))
    said, known = ["a", "red", "cat"], ["a", "red", "dog"]
    red, one = math.log(3 / 2), math.log(3)
    single = red**2 / (math.hypot(red, red) * math.hypot(red, one))
    # "red cat" is in one line, "a red" in two; "red dog" in one.
    pair = red**2 / (math.hypot(red, one) * math.hypot(red, one))
    assert cider_d(said, [known], rare) == pytest.approx(10 / 4 * (single + pair))
    longer = [*known, "x"]
    assert cider_d(said, [longer], rare) < cider_d(said, [known], rare)


def test_lengths_that_differ_are_punished_as_a_gaussian():
    known = ["a", "b", "c", "d"]
    whole = cider_d(known, [known])
    assert whole == pytest.approx(10)
    twice = cider_d(known * 2, [known])
    dots = []
    for n in range(1, 5):
        mine = {tuple((known * 2)[i : i + n]) for i in range(9 - n)}
        counts = {g: sum(tuple((known * 2)[i : i + n]) == g for i in range(9 - n)) for g in mine}
        other = [tuple(known[i : i + n]) for i in range(5 - n)]
        size = math.sqrt(sum(c * c for c in counts.values())) * math.sqrt(len(other))
        dots.append(sum(min(counts[g], 1) for g in other) / size)
    assert twice == pytest.approx(10 / 4 * math.exp(-16 / 72) * sum(dots))


@given(TEXT, TEXT)
def test_they_are_highest_for_the_reference_itself(one, other):
    said, best = overlap(" ".join(one), [" ".join(other)]), overlap(" ".join(other), [" ".join(other)])
    assert all(0 <= said[name] <= best[name] + 1e-9 for name in said)
    assert best["rouge_l"] == pytest.approx(1)
    assert best["bleu_4"] == pytest.approx(1)
    assert best["cider"] == pytest.approx(10)


def test_an_empty_caption_shares_nothing():
    assert set(overlap("...", ["a cat"]).values()) == {0.0}


def outcome() -> Outcome:
    told = [{"reference": "a red dog"}, {"references": ["two cats", "a pair of cats"]}, {}]
    return Outcome(prompts_of(["x", "y", "z"], 1, told), ["a red dog", "two cats sit", "a hat"])


def test_as_a_reward_it_tells_all_and_misses_what_has_no_reference():
    signal = load("caption_overlap", measure="rouge_l")(outcome())
    assert signal.valid[:, 0].tolist() == [True, True, False]
    assert signal.values[0, 0] == 1
    assert signal.details[1]["bleu_1"] == pytest.approx(2 / 3)
    assert "no reference" in signal.details[2]["missing"]
    check_reward(load("caption_overlap"), outcome())


def test_a_corpus_tells_what_is_rare(tmp_path):
    lines = [{"prompt": "x", "reference": text} for text in ("a red dog", "a red cat", "a blue cat")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    rare = rarity([[line["reference"]] for line in lines])
    signal = load("caption_overlap", corpus=str(file))(outcome())
    assert float(signal.values[0]) == pytest.approx(cider_d(["a", "red", "dog"], [["a", "red", "dog"]], rare))
    with pytest.raises(ValueError, match="there is no corpus"):
        load("caption_overlap", corpus=str(tmp_path / "none.jsonl"))
    file.write_text('{"prompt": "x"}')
    with pytest.raises(ValueError, match=r"no line of .* has a reference"):
        load("caption_overlap", corpus=str(file))
    with pytest.raises(ValueError, match="measure must be one of cider"):
        load("caption_overlap", measure="spice")


# METEOR


def tiny_wordnet(folder: Path, *synsets: tuple[str, ...]) -> Path:
    """A database of nouns in WordNet's format; a synset is found by the place where its line begins."""
    folder.mkdir()
    data = "  1 licence\n"
    index: dict[str, list[int]] = {}
    for names in synsets:
        for name in names:
            index.setdefault(name, []).append(len(data))
        listed = " ".join(f"{name} 0" for name in names)
        data += f"{len(data):08d} 06 n {len(names):02x} {listed} 000 | a thing  \n"
    rows = [
        f"{name} n {len(at)} 0 {len(at)} 0 {' '.join(f'{one:08d}' for one in at)}  \n"
        for name, at in sorted(index.items())
    ]
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part}").write_text(data if part == "noun" else "")
        (folder / f"index.{part}").write_text("".join(rows) if part == "noun" else "")
        (folder / f"{part}.exc").write_text("men man\n" if part == "noun" else "")
    return folder


def test_meteor_by_hand(tmp_path):
    pytest.importorskip("nltk", reason="pip install 'mmalign[metrics]'")
    wordnet = database(tiny_wordnet(tmp_path / "wordnet", ("sofa", "couch", "lounge"), ("man", "adult_male")))
    said, known = ["a", "dog", "chased", "the", "red", "sofa"], ["the", "dog", "chases", "a", "couch"]
    # a, dog and the are equal, chased has the stem of chases, sofa a synset with couch: 5 words match. In the
    # order of the reference only dog and chased follow each other: 4 chunks.
    p, r, chunks = 5 / 6, 5 / 5, 4
    f = p * r / (0.9 * p + 0.1 * r)
    by_hand = (1 - 0.5 * (chunks / 5) ** 3) * f
    assert meteor(said, [known], wordnet) == pytest.approx(by_hand)
    assert meteor(said, [["nothing"], known, ["a"]], wordnet) == pytest.approx(by_hand)
    assert meteor(known, [known], wordnet) == pytest.approx(1 - 0.5 * (1 / 5) ** 3)
    assert meteor([], [known], wordnet) == 0
    assert meteor(["men"], [["man"]], wordnet) == 0.5  # by the exceptions; one word is one chunk


def test_meteor_is_told_where_wordnet_is(tmp_path):
    pytest.importorskip("nltk", reason="pip install 'mmalign[metrics]'")
    folder = tiny_wordnet(tmp_path / "wordnet", ("dog", "hound"))
    signal = load("caption_overlap", measure="meteor", wordnet=str(folder))(outcome())
    assert signal.valid[:, 0].tolist() == [True, True, False]
    assert signal.values[0, 0] == pytest.approx(1 - 0.5 / 27)
    assert signal.details[1]["meteor"] == pytest.approx((1 - 0.5 / 8) * (2 / 3) / (0.9 * 2 / 3 + 0.1))
    assert "meteor" not in load("caption_overlap")(outcome()).details[0]
    with pytest.raises(ValueError, match="meteor needs wordnet"):
        load("caption_overlap", measure="meteor")
    (folder / "noun.exc").unlink()
    with pytest.raises(ValueError, match=r"wordnet .* has no noun\.exc"):
        load("caption_overlap", measure="meteor", wordnet=str(folder))
