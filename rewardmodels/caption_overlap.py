"""How much of the words of its references a caption shares: BLEU, ROUGE-L, CIDEr-D and METEOR.

    BLEU-n    b (prod_k p_k)^(1/n),  p_k: share of the caption's k-grams that a reference has, clipped
              b = exp(min(0, 1 - r / c)),  c, r: words of the caption and of the reference nearest in length
    ROUGE-L   (1 + B^2) P R / (R + B^2 P),  P, R: longest common subsequence over c and over r, B = 1.2
    CIDEr-D   10/4 sum_n mean_refs exp(-(c - r)^2 / 72) min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)
    METEOR    (1 - g (chunks / m)^b) P R / (a P + (1 - a) R),  P, R: m matched words over c and over r,
              a = 0.9, b = 3, g = 0.5

g_n: counts of n-grams times how rare each is among the references of a corpus. Papineni et al. 2002; Lin
2004; Vedantam et al. 2015 (arXiv:1411.5726). Precisions of BLEU for k > 1 have 1 added above and below (Lin
and Och 2004), because single captions often share no 4-gram. Of several references ROUGE-L takes the best P
and the best R, as the COCO code does.

METEOR is that of nltk, with the constants of Banerjee and Lavie 2005, the best of several references. Words
match if they are equal, then by their Porter stems, then by a synset of WordNet, which nltk looks up by the
stem: sofa and couch match, big and large ("larg") do not. METEOR 1.5, which the COCO code runs (Denkowski
and Lavie 2014), has other constants, paraphrases and weights of function words; their figures do not compare.

They count words and know no meaning: a caption that says the opposite in the same words is rated high. Made
to compare with older work, at weight 0.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.caption_judges import captions
from mmalign.rewardmodels.inputs import extras

Measure = Literal["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor"]
Grams = Counter[tuple[str, ...]]
LONGEST = 4  # words of an n-gram
SPREAD = 6.0  # of lengths, in CIDEr-D
RECALL = 1.2  # how much more recall weighs than precision, in ROUGE-L
ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5  # of METEOR: weight of recall, shape and size of the penalty of chunks
LEXNAMES = 45  # files that WordNet was written in
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(eq=False)
class CaptionOverlap:
    """One of the measures as a reward, all of them in its details; needs `reference` or `references`.

    METEOR is told where there is a `wordnet`, and needs nltk.
    """

    measure: Measure = "cider"  # which of them is the reward
    corpus: str | None = None  # prompt file whose references tell how rare words are; null: all count alike
    wordnet: str | None = None  # folder of WordNet's database (data.noun, noun.exc, ...); METEOR needs it
    name = "caption_overlap"

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            known = ", ".join(get_args(Measure))
            raise ValueError(f"caption_overlap: measure must be one of {known}, got {self.measure!r}")
        if self.measure == "meteor" and self.wordnet is None:
            raise ValueError("caption_overlap: meteor needs wordnet, the folder of WordNet's database")
        self._wordnet = None if self.wordnet is None else database(Path(self.wordnet))
        self._rare = None if self.corpus is None else rarity(read_corpus(Path(self.corpus)))

    def __call__(self, outcome: Outcome) -> RewardSignal:
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        for caption, extra in zip(captions(self.name, outcome), extras(outcome), strict=True):
            references = references_of(extra)
            if not references:
                values.append(torch.nan)
                details.append({"missing": "the prompt line has no reference"})
                continue
            found = overlap(caption, references, self._rare, self._wordnet)
            values.append(found[self.measure])
            details.append(dict(found))
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)


def references_of(extra: Mapping[str, object]) -> list[str]:
    """The references that a prompt line brings, one or several."""
    several = extra.get("references", extra.get("reference"))
    found = several if isinstance(several, list) else [several]
    return [text for text in found if isinstance(text, str) and text.strip()]


def read_corpus(file: Path) -> list[list[str]]:
    """The references of each line of a prompt file; ValueError where there are none."""
    if not file.is_file():
        raise ValueError(f"caption_overlap: there is no corpus {file}; name a prompt file with references")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        found = [references_of(json.loads(line)) for line in lines]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"caption_overlap: {file} is no prompt file of JSON lines: {error}") from error
    if not any(found):
        raise ValueError(f"caption_overlap: no line of {file} has a reference")
    return [references for references in found if references]


def overlap(
    caption: str,
    references: Sequence[str],
    rare: Mapping[tuple[str, ...], float] | None = None,
    wordnet: Any = None,
) -> dict[str, float]:
    """All measures of a caption.

    rare: see `rarity`; n-grams that it lacks are as rare as can be. wordnet: see `database`; without it there
    is no METEOR.
    """
    said, known = words(caption), [words(text) for text in references]
    found = {f"bleu_{n}": bleu(said, known, n) for n in range(1, LONGEST + 1)}
    found |= {"rouge_l": rouge_l(said, known), "cider": cider_d(said, known, rare)}
    return found if wordnet is None else found | {"meteor": meteor(said, known, wordnet)}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return WORD.findall(text.lower())


def grams(said: Sequence[str], n: int) -> Grams:
    return Counter(tuple(said[i : i + n]) for i in range(len(said) - n + 1))


def bleu(said: Sequence[str], references: Sequence[Sequence[str]], n: int) -> float:
    """BLEU-n of one caption, 0 to 1."""
    if not said:
        return 0.0
    total = 0.0
    for k in range(1, n + 1):
        mine = grams(said, k)
        most: Grams = Counter()
        for reference in references:
            most |= grams(reference, k)
        more = 0 if k == 1 else 1
        right, count = (mine & most).total() + more, mine.total() + more
        if not right:
            return 0.0
        total += math.log(right / count)
    nearest = min((len(reference) for reference in references), key=lambda r: (abs(r - len(said)), r))
    return math.exp(total / n + min(0.0, 1 - nearest / len(said)))


def rouge_l(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L, 0 to 1."""
    shared = [common(said, reference) for reference in references]
    precision = max(shared) / max(1, len(said))
    recall = max(one / max(1, len(reference)) for one, reference in zip(shared, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + RECALL**2) * precision * recall / (recall + RECALL**2 * precision)


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for j, against in enumerate(other, 1):
            above = row[j]
            row[j] = before + 1 if word == against else max(above, row[j - 1])
            before = above
    return row[-1]


def rarity(corpus: Sequence[Sequence[str]]) -> dict[tuple[str, ...], float]:
    """How rare each n-gram is: log of the lines of the corpus over those one of whose references has it.

    The empty n-gram stands for those that no line has.
    """
    lines: Grams = Counter()
    for references in corpus:
        seen = {gram for text in references for n in range(1, LONGEST + 1) for gram in grams(words(text), n)}
        lines.update(seen)
    size = math.log(max(len(corpus), 1))
    return {gram: size - math.log(count) for gram, count in lines.items()} | {(): size}


def cider_d(
    said: Sequence[str],
    references: Sequence[Sequence[str]],
    rare: Mapping[tuple[str, ...], float] | None = None,
) -> float:
    """CIDEr-D, 0 to 10."""
    total = 0.0
    for n in range(1, LONGEST + 1):
        mine = weighted(grams(said, n), rare)
        for reference in references:
            other = weighted(grams(reference, n), rare)
            size = norm(mine) * norm(other)
            if size:
                dot = sum(min(mine.get(gram, 0.0), value) * value for gram, value in other.items())
                total += math.exp(-((len(said) - len(reference)) ** 2) / (2 * SPREAD**2)) * dot / size
    return 10 * total / (LONGEST * len(references))


def weighted(counts: Grams, rare: Mapping[tuple[str, ...], float] | None) -> dict[tuple[str, ...], float]:
    if rare is None:
        return {gram: float(count) for gram, count in counts.items()}
    return {gram: count * rare.get(gram, rare[()]) for gram, count in counts.items()}


def norm(vector: Mapping[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(value**2 for value in vector.values()))


def meteor(said: Sequence[str], references: Sequence[Sequence[str]], wordnet: Any) -> float:
    """METEOR as nltk reckons it, 0 to 1; wordnet: see `database`."""
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score(references, said, wordnet=wordnet, alpha=ALPHA, beta=BETA, gamma=GAMMA))


def database(folder: Path) -> Any:
    """nltk's reader of WordNet's database, in about 3 s; ValueError where the folder lacks a file.

    It does without `lexnames` and `index.sense`, which distributions leave out and no synonym depends on.
    """
    try:
        import nltk.data
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
    except ImportError:
        raise ImportError("caption_overlap: METEOR needs nltk: pip install 'mmalign[metrics]'") from None
    parts = ("noun", "verb", "adj", "adv")
    needed = [name for part in parts for name in (f"data.{part}", f"index.{part}", f"{part}.exc")]
    lacking = [name for name in needed if not (folder / name).is_file()]
    if lacking:
        raise ValueError(
            f"caption_overlap: wordnet {folder} has no {', '.join(lacking)}; name the folder of its database "
            "(Debian's wordnet-base: /usr/share/wordnet; nltk's: corpora/wordnet)"
        )
    place = str(folder.resolve())

    class Database(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            if file == "lexnames" and not (folder / file).is_file():
                return io.StringIO("".join(f"{number:02d} unnamed 0\n" for number in range(LEXNAMES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """To another version, by index.sense: for other languages alone."""

    if place not in nltk.data.path:
        nltk.data.path.append(place)  # nltk opens no file elsewhere
    with warnings.catch_warnings(action="ignore"):  # that there are no other languages
        return Database(place, None)
