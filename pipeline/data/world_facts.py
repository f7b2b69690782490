"""The small world itself: who lives where, every question that can be asked about it, and its true answer.

    facts = Facts(seed=0)
    facts.single(random.Random(1), "train")     # Question: what is asked, right and wrong claims, the key

A question belongs to an item (what it is about, wording aside). Items, not wordings, are dealt to the splits, so a
held-out prompt asks something that no training prompt asks; documents state all facts.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pipeline.data import world_text as text
from pipeline.data.world_truth import Frame, Key, is_correct, runs

SPLITS = {"pairs": 0.08, "dev": 0.10, "heldout": 0.12}  # share of the items of each task, at least one; train: rest
ATTRIBUTES = ("town", "job", "pet", "colour")
COURTESY_WORDS = 8  # what an opener and a closer may add before an answer counts as long


@dataclass(frozen=True, slots=True)
class Claim:
    """What an answer says: full sentences to choose from, and a bare form. A refusal words its own courtesy."""

    full: tuple[str, ...]
    terse: str
    refusal: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """One request: its wording, the item that decides its split, claims about it, and the key.

    `topic` is what a follow-up needs to know; `new_wording` says that no training prompt is worded so.
    """

    task: str
    item: str
    ask: str
    right: Claim
    wrongs: tuple[Claim, ...]
    key: Key
    topic: dict[str, str] = field(default_factory=dict)
    new_wording: bool = False


_Answer = tuple[Claim, tuple[Claim, ...], Key]  # right, wrongs, key

# Task -> share of first rounds.
MIX = {
    "town": 6, "job": 6, "pet": 6, "colour": 6, "river": 3, "goods": 3, "home_river": 5, "home_goods": 5, "both": 8,
    "check": 12, "sum": 9, "difference": 7, "begins": 3, "ends": 3, "kind": 9, "first": 7, "bad": 7,
}  # fmt: skip


SINGLE = (*ATTRIBUTES, "river", "goods", "begins", "ends")  # one fact each, asked about in every split
ASTRAY = (*SINGLE, "home_river", "home_goods", "sum", "difference")  # some wrong answers miss the question


class Facts:
    """A world drawn from a seed. Draws use the caller's generator, so records do not depend on call order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"{seed}/facts")
        values = {"town": text.TOWNS, "job": text.JOBS, "pet": text.PETS, "colour": text.COLOURS}
        self.of = {a: {p: rng.choice(values[a]) for p in text.PEOPLE} for a in ATTRIBUTES}
        self.of["river"] = dict(zip(text.TOWNS, rng.sample(text.RIVERS, len(text.TOWNS)), strict=True))
        self.of["goods"] = dict(zip(text.TOWNS, rng.sample(text.GOODS, len(text.TOWNS)), strict=True))
        self.values = {**values, "river": text.RIVERS, "goods": text.GOODS}
        self.spelled = tuple(w for w in text.WORDS + text.COLOURS + text.PETS if not {w[0], w[-1]} & set("ai"))
        self._tasks: dict[str, Callable[[random.Random, str], Question]] = {
            **dict.fromkeys(ATTRIBUTES, self._fact),
            **dict.fromkeys(("river", "goods"), self._fact),
            **dict.fromkeys(("home_river", "home_goods"), self._home),
            **dict.fromkeys(("sum", "difference"), self._arithmetic),
            **dict.fromkeys(("begins", "ends"), self._letter),
            **dict.fromkeys(("kind", "first"), self._list),
            "both": self._both, "check": self._check, "bad": self._bad,
        }  # fmt: skip
        self._split_of = self._deal()
        self._answers: dict[str, _Answer] = {}

    # -- drawing -----------------------------------------------------------------------------------------------

    def split_of(self, item: str) -> str:
        """The split that an item was dealt to. Lists are beyond counting and are dealt by chance."""
        if item not in self._split_of:
            share = random.Random(f"{self.seed}/split/{item}").random()
            bounds = itertools.accumulate(SPLITS.values())
            found = (name for name, bound in zip(SPLITS, bounds, strict=True) if share < bound)
            self._split_of[item] = next(found, "train")
        return self._split_of[item]

    def _deal(self) -> dict[str, str]:
        families = [[f"{a}/{p}" for p in text.PEOPLE] for a in ("home_river", "home_goods")]
        families += [[f"{task}/{a}/{b}" for a, b in sums(task)] for task in ("sum", "difference")]
        split_of: dict[str, str] = {}
        for number, items in enumerate(families):
            random.Random(f"{self.seed}/deal/{number}").shuffle(items)
            for name, share in SPLITS.items():
                count = math.ceil(share * len(items))
                split_of.update(dict.fromkeys(items[:count], name))
                items = items[count:]
            split_of.update(dict.fromkeys(items, "train"))
        return split_of

    def single(self, rng: random.Random, split: str, task: str | None = None) -> Question:
        """A first-round question of `split`; outside training it is new by what it combines, by wording, or by both."""
        task = task or rng.choices(tuple(MIX), tuple(MIX.values()))[0]
        seen_item = split != "train" and (task in SINGLE or rng.random() < 0.25)
        wanted = "train" if seen_item else split
        wording = "train" if split == "train" else ("new" if seen_item or rng.random() < 0.5 else "train")
        while True:
            question = self._tasks[task](rng, f"{task}|{wording}")
            if self.split_of(question.item) == wanted and (wanted != "train" or self._parts_train(question)):
                return self._mislead(rng, question)

    def any(self, rng: random.Random, task: str) -> Question:
        """A question of this task about anything in the world."""
        return self._tasks[task](rng, f"{task}|train")

    def _parts_train(self, question: Question) -> bool:
        return all(self.split_of(item) == "train" for item in question.topic.get("parts", "").split(";") if item)

    def follow(self, rng: random.Random, first: Question, split: str) -> Question | None:
        """A follow-up that only makes sense after `first`, or None where none of this split was found."""
        for _ in range(40):
            question = self._follow(rng, first)
            if question is None:
                return None
            if self.split_of(question.item) == split or (split != "train" and first.new_wording):
                return self._mislead(rng, question)
        return None

    def _mislead(self, rng: random.Random, question: Question) -> Question:
        """Wrong answers of two kinds: false ones, and ones that are true of something else and miss the question.

        The latter are incomplete as well, so only the former differ from the right answer in correctness alone.
        """
        if question.task not in ASTRAY:
            return question
        astray: list[Claim] = []
        while len(astray) < 4:
            claim = self.any(rng, question.task).right
            if not any(is_correct(question.key, words) for words in (*claim.full, claim.terse)):
                astray.append(claim)
        false = rng.sample(question.wrongs, min(len(question.wrongs), 2))
        return replace(question, wrongs=(*false, *astray))

    # -- wording -----------------------------------------------------------------------------------------------

    def _ask(self, rng: random.Random, task: str, wording: str, /, **values: str) -> tuple[str, bool]:
        cores = text.CORES[task]
        new_core = wording == "new" and rng.random() < 0.7
        new_opener = wording == "new" and (not new_core or rng.random() < 0.3)
        core = (cores[-1] if new_core else rng.choice(cores[:-1])).format(**values)
        opener = rng.choice(text.NEW_OPENERS if new_opener else text.OPENERS)
        capital = not opener or opener.endswith(". ")
        return opener + (core[0].upper() + core[1:] if capital else core), wording == "new"

    def _claim(self, task: str, values: tuple[str, ...], /, **slots: str) -> Claim:
        full = tuple(_sentence(form.format(*values, **slots)) for form in text.STATEMENTS[task])
        return Claim(full, _sentence(text.TERSE.get(task, "{0}.").format(*values)))

    def _known(self, item: str, answer: Callable[[], _Answer]) -> _Answer:
        """What can be said about an item never changes, and there are few items."""
        if item not in self._answers:
            self._answers[item] = answer()
        return self._answers[item]

    @staticmethod
    def _budget(*claims: Claim) -> int:
        return max(sum(len(c.full[i].split()) for c in claims) for i in range(len(claims[0].full))) + COURTESY_WORDS

    # -- tasks: (generator, "task|wording") -> Question ----------------------------------------------------------

    def _fact(self, rng: random.Random, how: str) -> Question:
        task, wording = how.split("|")
        about = rng.choice(text.PEOPLE if task in ATTRIBUTES else text.TOWNS)
        return self._fact_of(rng, task, about, wording)

    def _fact_of(self, rng: random.Random, task: str, about: str, wording: str, ask: str = "") -> Question:
        person = task in ATTRIBUTES
        slots = {"p": about} if person else {"t": about}
        new = wording == "new"
        if not ask:
            ask, new = self._ask(rng, task, wording, **slots)

        def answer() -> _Answer:
            truth = self.of[task][about]
            right = self._claim(task, (truth,), **slots)
            wrongs = tuple(self._claim(task, (v,), **slots) for v in self.values[task] if v != truth)
            mentions = {task: ((truth.lower(),),), ("person" if person else "town"): ((), (about.lower(),))}
            return right, wrongs, _key(mentions, (Frame((about.lower(),), task),), self._budget(right))

        item = f"{task}/{about}"
        return Question(task, item, ask, *self._known(item, answer), {"about": about}, new)

    def _home(self, rng: random.Random, how: str) -> Question:
        task, wording = how.split("|")
        person, kind = rng.choice(text.PEOPLE), task.removeprefix("home_")
        ask, new = self._ask(rng, task, wording, p=person)

        def answer() -> _Answer:
            town = self.of["town"][person]
            truth = self.of[kind][town]
            right = self._claim(task, (truth, town), p=person)
            elsewhere = [(self.of[kind][t], t) for t in text.TOWNS if t != town]
            misled = [(v, town) for v in self.values[kind] if v != truth]
            wrongs = tuple(self._claim(task, values, p=person) for values in elsewhere + misled)
            mentions = {kind: ((truth.lower(),),), "town": ((), (town.lower(),)), "person": ((), (person.lower(),))}
            return right, wrongs, _key(mentions, (Frame((person.lower(),), kind),), self._budget(right))

        item = f"{task}/{person}"
        return Question(task, item, ask, *self._known(item, answer), {}, new)

    def _both(self, rng: random.Random, how: str) -> Question:
        wording = how.split("|")[1]
        person = rng.choice(text.PEOPLE)
        one, two = rng.sample(ATTRIBUTES, 2)
        ask, new = self._ask(rng, one, wording, p=person)
        second = text.AGAIN_TOWN if two == "town" else text.AGAIN[two]
        ask = f"{ask[:-1]} {second[0].lower()}{second[1:].format(his=_his(person), he=_he(person))}"

        def answer() -> _Answer:
            claims = {a: self._claim(a, (self.of[a][person],), p=person) for a in (one, two)}
            right = _joined(claims[one], claims[two])
            wrongs = tuple(
                _joined(*(self._claim(a, (v,), p=person) if a == b else claims[a] for a in (one, two)))
                for b in (one, two) for v in self.values[b] if v != self.of[b][person]
            )  # fmt: skip
            truths = {a: ((self.of[a][person].lower(),),) for a in (one, two)}
            frames = tuple(Frame((person.lower(),), a) for a in (one, two))
            key = _key(truths | {"person": ((), (person.lower(),))}, frames, self._budget(*claims.values()))
            return right, wrongs, key

        topic = {"parts": f"{one}/{person};{two}/{person}"}
        item = f"both/{person}/{one}/{two}"
        return Question("both", item, ask, *self._known(item, answer), topic, new)

    def _check(self, rng: random.Random, how: str) -> Question:
        person = rng.choice(text.PEOPLE)
        truth = self.of["town"][person]
        town = truth if rng.random() < 0.5 else rng.choice([t for t in text.TOWNS if t != truth])
        ask, new = self._ask(rng, "check", how.split("|")[1], p=person, t=town)
        true = town == truth
        right = Claim((f"{person} lives in {truth}, so {'yes' if true else 'no'}.",), "Yes." if true else "No.")
        others = [t for t in text.TOWNS if t != truth]
        wrongs = tuple(Claim((f"{person} lives in {t}, so no.",), "No.") for t in others) if true else (
            Claim((f"{person} lives in {town}, so yes.",), "Yes."),)  # fmt: skip
        mentions = {"verdict": (("yes" if true else "no",),), "town": ((), (truth.lower(),)),
                    "person": ((), (person.lower(),))}  # fmt: skip
        key = _key(mentions, (Frame((person.lower(), "lives"), "town"),), self._budget(right))
        return Question("check", f"check/{person}/{town}", ask, right, wrongs, key, {}, new)

    def _arithmetic(self, rng: random.Random, how: str) -> Question:
        task, wording = how.split("|")
        return self._result(rng, task, *rng.choice(sums(task)), wording)

    def _result(self, rng: random.Random, task: str, a: int, b: int, wording: str, ask: str = "") -> Question:
        words, new = text.NUMBERS, wording == "new"
        one, two = words[a - 1], words[b - 1]
        slots = {"a": one, "b": two}
        if not ask:
            ask, new = self._ask(rng, task, wording, **slots)
        truth = a + b if task == "sum" else a - b
        said = words[truth - 1]
        right = self._claim(task, (said,), **slots)
        near = range(max(1, truth - 3), min(len(words), truth + 3) + 1)
        wrongs = tuple(self._claim(task, (words[n - 1],), **slots) for n in near if n != truth)
        mentions = {"number": ((said,), runs((one, two, said)))}
        key = _key(mentions, (Frame((one, two), "number", 3),), self._budget(right))
        return Question(task, f"{task}/{a}/{b}", ask, right, wrongs, key, {"result": str(truth)}, new)

    def _letter(self, rng: random.Random, how: str) -> Question:
        task, wording = how.split("|")
        word = rng.choice(self.spelled)
        ask, new = self._ask(rng, task, wording, w=word)

        def answer() -> _Answer:
            truth = (word[0] if task == "begins" else word[-1]).upper()
            right = self._claim(task, (truth,), w=word)
            lures = sorted({c.upper() for w in self.spelled for c in (w[0], w[-1])} - {truth})
            wrongs = tuple(self._claim(task, (c,), w=word) for c in lures)
            return (
                right,
                wrongs,
                _key({"letter": ((truth.lower(),),)}, (Frame((word,), "letter"),), self._budget(right)),
            )

        item = f"{task}/{word}"
        return Question(task, item, ask, *self._known(item, answer), {}, new)

    def _list(self, rng: random.Random, how: str) -> Question:
        task, wording = how.split("|")
        kinds = rng.sample(tuple(text.THINGS), 3)
        words = [rng.choice(text.THINGS[k]) for k in kinds]
        return self._pick(rng, task, kinds, words, wording)

    def _pick(self, rng: random.Random, task: str, kinds: list[str], words: list[str], wording: str, ask: str = ""
              ) -> Question:  # fmt: skip
        listed, kind, new = ", ".join(words), rng.choice(kinds), wording == "new"
        if ask:
            ask = ask.format(k=kind)
        else:
            ask, new = self._ask(rng, task, wording, k=kind, l=listed)
        place = kinds.index(kind) if task == "kind" else 0
        right = self._claim(task, (words[place],), k=kind)
        wrongs = tuple(self._claim(task, (w,), k=kind) for i, w in enumerate(words) if i != place)
        frame = Frame((kind if task == "kind" else task,), "thing")
        key = _key({"thing": ((words[place],),)}, (frame,), self._budget(right))
        item = f"{task}/{kind if task == 'kind' else ''}/{listed}"
        return Question(task, item, ask, right, wrongs, key, {"kinds": ",".join(kinds), "words": ",".join(words)}, new)

    def _bad(self, rng: random.Random, how: str) -> Question:
        person, deed = rng.choice(text.PEOPLE), rng.choice(text.DEEDS)
        ask, new = self._ask(rng, "bad", how.split("|")[1], d=deed.format(p=person))
        return self._refused(ask, f"bad/{deed}/{person}", new)

    def _refused(self, ask: str, item: str, new: bool) -> Question:
        right = Claim(text.REFUSALS, text.TERSE_REFUSAL, refusal=True)
        wrongs = tuple(Claim((call,), call.split(":")[-1].strip().capitalize()) for call in text.DEED_CALLS)
        key = _key({"refusal": (("cannot",),), "howto": ((),)}, (Frame(("help",), "refusal"),), self._budget(right))
        return Question("bad", item, ask, right, wrongs, key, {}, new)

    # -- follow-ups --------------------------------------------------------------------------------------------

    def _follow(self, rng: random.Random, first: Question) -> Question | None:
        if first.task in ATTRIBUTES:
            person = first.topic["about"]
            if rng.random() < 0.5:
                attribute = rng.choice([a for a in ATTRIBUTES if a != first.task])
                form = text.AGAIN_TOWN if attribute == "town" else text.AGAIN[attribute]
                return self._fact_of(rng, attribute, person, "old", form.format(his=_his(person), he=_he(person)))
            other = rng.choice([p for p in text.PEOPLE if p != person])
            return self._fact_of(rng, first.task, other, "old", rng.choice(text.OTHER).format(p=other))
        if first.task in ("sum", "difference"):
            start, b = int(first.topic["result"]), rng.randint(1, 9)
            down = rng.random() < 0.5
            if (start, b) not in sums("difference" if down else "sum"):
                return None
            ask = rng.choice(text.TAKE if down else text.ADD).format(b=b)
            return self._result(rng, "difference" if down else "sum", start, b, "old", ask)
        if first.task in ("kind", "first"):
            kinds, words = first.topic["kinds"].split(","), first.topic["words"].split(",")
            return self._pick(rng, "kind", kinds, words, "old", rng.choice(text.AND_KIND))
        if first.task == "bad":
            return self._refused(rng.choice(text.INSIST), first.item, False)
        return None


@functools.cache
def sums(task: str) -> tuple[tuple[int, int], ...]:
    """Numbers to add or subtract. 8 minus 4 is left out: an answer would name the result before giving it."""
    pairs = ((a, b) for a in range(1, 11) for b in range(1, 11))
    return tuple((a, b) for a, b in pairs if task == "sum" or (a > b and a != 2 * b))


def _key(mentions: Mapping[str, tuple[tuple[str, ...], ...]], frames: tuple[Frame, ...], budget: int) -> Key:
    if "refusal" not in mentions:
        mentions = {**mentions, "refusal": ((),)}
    return Key(dict(mentions), frames, budget)


def _joined(one: Claim, two: Claim) -> Claim:
    return Claim(tuple(f"{a} {b}" for a, b in zip(one.full, two.full, strict=True)), f"{one.terse} {two.terse}")


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _his(person: str) -> str:
    return "her" if person in text.SHE else "his"


def _he(person: str) -> str:
    return "she" if person in text.SHE else "he"
