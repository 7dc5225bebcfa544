"""Win rates from a judge of pairs: what share of its group a sample beats.

A judge may prefer whatever it sees first; asked in both orders that cancels out, and how often the two
verdicts agree is reported. Each process asks the questions in which its own samples come first, so that every
question is asked once, wherever the members of a group lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmalign.contracts import Media, PairwiseReward, RewardError
from mmalign.credit import Gather, Peers, alone
from mmalign.records import Outcome, Prompts, RewardSignal

PAIRS = 64  # questions that a judge gets at once


def win_rates(
    judge: PairwiseReward, outcome: Outcome, gather: Gather = alone
) -> tuple[RewardSignal, Counter[str]]:
    """The win rate of every own sample, and the reasons why questions have no answer.

    A question without an answer drops the pair; a sample of which no pair is left has no verdict. Details
    hold `questions`, how many were asked with the sample first, and with both orders `consistent`, the share
    of pairs on which they agree.
    """
    if outcome.views != 1:
        raise RewardError(f"{judge.name!r} compares one completion a sample, not {outcome.views}")
    peers = Peers(outcome.prompts, gather)
    mine, group = peers.mine.tolist(), peers.group.tolist()
    questions = [
        (row, other)
        for row, sample in enumerate(mine)
        for other in range(len(group))
        if group[other] == group[sample] and _asked(sample, other, judge.both_orders)
    ]
    media, place = _reachable(outcome.media, peers)
    first, second = [row for row, _ in questions], [place[other] for _, other in questions]
    answers = torch.full((len(mine), len(group)), torch.nan)
    reasons: Counter[str] = Counter()
    for start in range(0, len(questions), PAIRS):
        part = slice(start, start + PAIRS)
        prompts, left = outcome.prompts.take(torch.tensor(first[part])), _at(outcome.media, first[part])
        found, why = _ask(judge, prompts, left, _at(media, second[part]))
        reasons += why
        for (row, other), answer in zip(questions[part], found.tolist(), strict=True):
            answers[row, other] = answer
    table = peers.all(answers)  # [N, N], how far the row is preferred when it comes first
    both = torch.stack([table, 1 - table.T])
    rates = both.nanmean(0).nanmean(1)
    agree = ((both[0] - 0.5).sign() == (both[1] - 0.5).sign()).double()
    consistent = torch.where(both.isnan().any(0), torch.nan, agree).nanmean(1)
    count = (~answers.isnan()).sum(1).tolist()
    details: list[Mapping[str, object]] = [
        {"questions": number} | ({"consistent": share} if share == share else {})
        for number, share in zip(count, consistent[peers.mine].tolist(), strict=True)
    ]
    return RewardSignal(judge.name, rates[peers.mine, None], details=details), reasons


def _asked(sample: int, other: int, both_orders: bool) -> bool:
    """Whether there is a question with `sample` first; with one order a pair each is first half the time."""
    if sample == other:
        return False
    return both_orders or (sample < other) == ((sample + other) % 2 == 1)


def _reachable(media: Media, peers: Peers) -> tuple[Media, dict[int, int]]:
    """Media among which are those of all members of own groups, and the row of each by its place."""
    if peers.whole():
        return media, {place: row for row, place in enumerate(peers.mine.tolist())}
    if not isinstance(media, Tensor):
        raise RewardError(
            "texts are compared only where a group lies on one process: make prompts.per_iteration a "
            "multiple of the processes"
        )
    return peers.all(media), {place: place for place in range(len(peers))}


def _at(media: Media, rows: Sequence[int]) -> Media:
    return media[torch.tensor(rows)] if isinstance(media, Tensor) else [media[row] for row in rows]


def _ask(judge: PairwiseReward, prompts: Prompts, first: Media, second: Media) -> tuple[Tensor, Counter[str]]:
    """Answers to some questions, NaN where there is none. If they fail together, each is asked by itself."""
    try:
        found = judge.prefer(prompts, first, second)
    except Exception as error:
        if len(prompts) == 1:
            return torch.tensor([torch.nan]), Counter({f"{type(error).__name__}: {error}"[:200]: 1})
        rows = [slice(i, i + 1) for i in range(len(prompts))]
        each = [
            _ask(judge, prompts.take(torch.arange(len(prompts))[row]), first[row], second[row])
            for row in rows
        ]
        return torch.cat([answer for answer, _ in each]), sum((why for _, why in each), Counter())
    if found.shape != (len(prompts),) or bool(((found < 0) | (found > 1)).any()):
        raise RewardError(
            f"{judge.name!r} must answer {len(prompts)} questions by numbers in [0, 1], or NaN, got "
            f"{found.tolist()}"
        )
    return found.detach().float().cpu(), Counter()
