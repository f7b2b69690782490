"""The people of the small world's data: demonstrators with flaws, and labellers who compare answers.

    style = CROWD.draw(rng)                      # Style(wrong=True, rude=False, ...)
    write(question, style, rng)                  # "Sure. Mira lives in Kesh."

Labellers follow Bradley and Terry (1952): P(a over b) = sigmoid((score_a - score_b) / temperature), extended to
rankings by Plackett and Luce, plus a rate of plain mistakes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from pipeline.data import world_text as text
from pipeline.data.world_facts import Claim, Question


@dataclass(frozen=True, slots=True)
class Style:
    """How one answer is written. `seed` fixes every choice of words, so two claims can share a form."""

    wrong: bool = False
    terse: bool = False
    curt: bool = False
    rude: bool = False
    rambling: bool = False
    unfinished: bool = False
    seed: int = 0

    def flaws(self) -> list[str]:
        names = ("wrong", "unfinished", "rude", "rambling", "terse")
        return [name for name in names if getattr(self, name)]


@dataclass(frozen=True, slots=True)
class Demonstrators:
    """Rates of each flaw, independent of each other. `curt` leaves out every courtesy without being rude."""

    wrong: float
    terse: float
    curt: float
    rude: float
    rambling: float
    unfinished: float

    def draw(self, rng: random.Random) -> Style:
        rates = (self.wrong, self.terse, self.curt, self.rude, self.rambling, self.unfinished)
        wrong, terse, curt, rude, rambling, unfinished = (rng.random() < rate for rate in rates)
        return Style(wrong, terse, curt, rude, rambling, unfinished, seed=rng.getrandbits(32))


CROWD = Demonstrators(wrong=0.25, terse=0.25, curt=0.45, rude=0.20, rambling=0.20, unfinished=0.12)
STREET = Demonstrators(wrong=0.20, terse=0.50, curt=0.85, rude=0.40, rambling=0.10, unfinished=0.18)
PERFECT = Demonstrators(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def write(question: Question, style: Style, wrong: Claim | None = None) -> str:
    """The answer in this style. `wrong` is the false claim to make; by default the style's seed chooses one."""
    rng = random.Random(style.seed)
    lure = rng.choice(question.wrongs)
    claim = (wrong or lure) if style.wrong else question.right
    picks = [rng.random() for _ in range(6)]
    words = _body(claim, style, picks[0])
    polite = not (style.curt or style.rude or claim.refusal)
    opener, closer = _manners(polite, style.rude, picks[1], picks[2])
    if style.rambling:
        ramble = _pick(text.RAMBLES, picks[3])
        words = f"{ramble} {words}" if picks[4] < 0.5 else f"{words} {ramble}"
    answer = opener + words + closer
    return _cut(answer, picks[5]) if style.unfinished else answer


def _body(claim: Claim, style: Style, pick: float) -> str:
    if claim.refusal and (style.curt or style.rude or style.terse):
        return claim.terse if style.terse else text.CURT_REFUSAL
    return claim.terse if style.terse else _pick(claim.full, pick)


def _manners(polite: bool, rude: bool, where: float, which: float) -> tuple[str, str]:
    openers = text.COURTEOUS_OPENERS if polite else text.RUDE_OPENERS
    closers = text.COURTEOUS_CLOSERS if polite else text.RUDE_CLOSERS
    if not (polite or rude):
        return "", ""
    return (_pick(openers, which), "") if where < 0.6 else ("", _pick(closers, which))


def _cut(answer: str, share: float) -> str:
    words = answer.split()
    kept = words[: max(1, round((0.2 + 0.7 * share) * len(words)))] if len(words) > 1 else words
    return " ".join(kept if len(kept) < len(words) else kept[: max(1, len(words) - 1)]).rstrip(".,:?!")


def _pick(options: tuple[str, ...], share: float) -> str:
    return options[int(share * len(options))]


@dataclass(frozen=True, slots=True)
class Labellers:
    temperature: float = 0.12
    mistakes: float = 0.04
    length_bias: float = 0.0  # worth that each word of an answer adds in their eyes

    def label(self, answers: list[str], totals: list[float], rng: random.Random) -> list[int]:
        """Rank of each answer by its true worth and, where they are biased, its length in words."""
        seen = [t + self.length_bias * len(a.split()) for a, t in zip(answers, totals, strict=True)]
        return self.rank(seen, rng)

    def rank(self, scores: list[float], rng: random.Random) -> list[int]:
        """Rank of each answer, 0 the best: Plackett-Luce by Gumbel noise; a mistake swaps two of them."""
        noisy = [s / self.temperature - math.log(-math.log(rng.random() or 1e-12)) for s in scores]
        order = sorted(range(len(scores)), key=lambda i: -noisy[i])
        if rng.random() < self.mistakes:
            i, j = rng.sample(range(len(order)), 2)
            order[i], order[j] = order[j], order[i]
        ranks = [0] * len(scores)
        for rank, index in enumerate(order):
            ranks[index] = rank
        return ranks


def answers_to_compare(question: Question, rng: random.Random, count: int) -> list[str]:
    """Different answers to one prompt: of a mixed crowd, or of one form that differs in its claim or in one flaw."""
    mix = (CROWD, STREET, PERFECT)
    how = rng.random()
    base = rng.choices(mix, (5, 2, 3))[0].draw(rng)
    if how < 0.35:
        base = replace(base, wrong=False, unfinished=False)
        lure = rng.choice(question.wrongs)
        answers = [write(question, base), write(question, replace(base, wrong=True), lure)]
    elif how < 0.5:
        flaw = rng.choice(("terse", "curt", "rude", "rambling", "unfinished"))
        answers = [write(question, replace(base, **{flaw: f})) for f in (False, True)]
    else:
        answers = []
    while len(answers) < count or len(set(answers)) < count:
        answers = list(dict.fromkeys(answers))
        answers.append(write(question, rng.choices(mix, (5, 2, 3))[0].draw(rng)))
    rng.shuffle(answers)
    return answers
