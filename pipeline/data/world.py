"""The embedded default: all records of a small closed world whose truth is known.

    world = build_world(seed=0, sizes=Sizes())
    world.conversations[0]          # imperfect demonstrations for SFT
    world.judge                     # (prompt messages, key) of every prompt: for the judge alone

Training records (documents, conversations, comparisons, prompts) hold text and noisy labels, never a score or key.
Prompts are split by what they ask about and by wording: development and test prompts ask about combinations, in
wordings, that no training prompt holds, and no two splits share a prompt. Documents state every fact of the world.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.data import world_text as text
from pipeline.data.records import Comparison, Completion, Conversation, Document, Message, Prompt
from pipeline.data.world_crowd import CROWD, PERFECT, STREET, Demonstrators, Labellers, answers_to_compare, write
from pipeline.data.world_facts import ATTRIBUTES, Facts, Question, sums
from pipeline.data.world_long import long_document
from pipeline.data.world_truth import Key, judge_text
from pipeline.flow.errors import UserError

TRIES = 2000  # draws for one new prompt before the world counts as exhausted
LONG_WORDS = 400
Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Sizes:
    """Records of each output. 60,000 documents are about 2.2 million tokens."""

    documents: int = 60_000
    heldout_documents: int = 600
    conversations: int = 4_000
    comparisons: int = 40_000
    heldout_pairs: int = 1_000
    prompts: int = 2_000
    dev: int = 300
    heldout: int = 600
    long_documents: int = 0
    heldout_long_documents: int = 0


@dataclass(slots=True)
class World:
    documents: list[Document] = field(default_factory=list)
    heldout_documents: list[Document] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    perfect_conversations: list[Conversation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    heldout_pairs: list[Comparison] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    dev: list[Prompt] = field(default_factory=list)
    heldout: list[Prompt] = field(default_factory=list)
    judge: list[tuple[Messages, Key]] = field(default_factory=list)
    long_documents: list[Document] = field(default_factory=list)
    heldout_long_documents: list[Document] = field(default_factory=list)


def build_world(
    seed: int = 0, sizes: Sizes | None = None, length_bias: float = 0.0, long_words: int = LONG_WORDS
) -> World:
    """The whole world from a seed, the same in every process; `length_bias` changes the labels alone, `long_words` is
    the length of long documents."""
    return _Builder(seed, sizes or Sizes(), Labellers(length_bias=length_bias), long_words).build()


class _Builder:
    def __init__(self, seed: int, sizes: Sizes, labellers: Labellers, long_words: int) -> None:
        self.long_words = long_words
        self.seed, self.sizes, self.facts, self.world = seed, sizes, Facts(seed), World()
        self.labellers = labellers
        self.split_of_prompt: dict[Messages, str] = {}

    def build(self) -> World:
        world, sizes = self.world, self.sizes
        for split, prompts, count in (("heldout", world.heldout, sizes.heldout), ("dev", world.dev, sizes.dev)):
            prompts.extend(self._prompts(split, count))
        world.heldout_pairs = self._comparisons("pairs", sizes.heldout_pairs, kwise=0.0)
        world.prompts = self._prompts("train", sizes.prompts)
        world.comparisons = self._comparisons("train", sizes.comparisons, kwise=0.2)
        for rng in self._each("conversations", sizes.conversations):
            flawed, perfect = self._demonstrations(rng)
            world.conversations.append(flawed)
            world.perfect_conversations.append(perfect)
        writer = _Writer(self.facts)
        world.documents = [writer.document(rng) for rng in self._each("documents", sizes.documents)]
        world.heldout_documents = [
            writer.document(rng) for rng in self._each("heldout_documents", sizes.heldout_documents)
        ]
        for name in ("long_documents", "heldout_long_documents"):
            rngs = self._each(name, getattr(sizes, name))
            setattr(world, name, [long_document(rng, self.long_words, writer.text) for rng in rngs])
        return world

    def _each(self, what: str, count: int) -> list[random.Random]:
        """One generator a record, so that a size changes how many records there are and not which."""
        return [random.Random(f"{self.seed}/{what}/{i}") for i in range(count)]

    # -- prompts -----------------------------------------------------------------------------------------------

    def _asked(self, rng: random.Random, split: str, unique: bool) -> tuple[Messages, Question]:
        """A prompt of this split (a quarter with an earlier round) and its question; its key goes to the judge."""
        for _ in range(TRIES):
            question = self.facts.single(rng, split)
            messages: Messages = (Message("user", question.ask),)
            if rng.random() < 0.3:
                follow = self.facts.follow(rng, question, split)
                if follow is not None:
                    style = Demonstrators(0, 0, 0.5, 0, 0, 0).draw(rng)
                    reply = Message("assistant", write(question, style))
                    messages, question = (*messages, reply, Message("user", follow.ask)), follow
            owner = self.split_of_prompt.get(messages)
            if owner is None:
                self.world.judge.append((messages, question.key))
                self.split_of_prompt[messages] = split
                return messages, question
            if owner == split and not unique:
                return messages, question
        raise UserError(
            f"the world has too few different prompts for its {split} split: ask for fewer in its source "
            f"(prompts, dev, heldout)"
        )

    def _prompts(self, split: str, count: int) -> list[Prompt]:
        asked = [self._asked(rng, split, unique=True) for rng in self._each(f"prompts/{split}", count)]
        return [Prompt(f"{split}-{i}", messages, q.task) for i, (messages, q) in enumerate(asked)]

    def _comparisons(self, split: str, count: int, kwise: float) -> list[Comparison]:
        found = []
        for rng in self._each(f"comparisons/{split}", count):
            messages, question = self._asked(rng, split, unique=False)
            answers = answers_to_compare(question, rng, 4 if rng.random() < kwise else 2)
            ranks = self.labellers.label(answers, [judge_text(question.key, a, True).total for a in answers], rng)
            completions = tuple(Completion(a, rank) for a, rank in zip(answers, ranks, strict=True))
            found.append(Comparison(messages, completions))
        return found

    # -- demonstrations ----------------------------------------------------------------------------------------

    def _demonstrations(self, rng: random.Random) -> tuple[Conversation, Conversation]:
        """One dialogue twice: by an imperfect demonstrator, and by one without flaws."""
        while True:
            rounds = dialogue(self.facts, rng, "train")
            first = (Message("user", rounds[0].ask),)
            if self.split_of_prompt.get(first, "train") == "train":
                break
        pairs = []
        for who in (CROWD, PERFECT):
            messages: Messages = ()
            for question in rounds:
                messages += (Message("user", question.ask), Message("assistant", write(question, who.draw(rng))))
            pairs.append(Conversation(messages))
        return pairs[0], pairs[1]


def dialogue(facts: Facts, rng: random.Random, split: str, more: float = 0.4) -> list[Question]:
    """One to three rounds, each later one leaning on the round before it."""
    rounds = [facts.single(rng, split)]
    while len(rounds) < 3 and rng.random() < more:
        follow = facts.follow(rng, rounds[-1], split)
        if follow is None:
            break
        rounds.append(follow)
    return rounds


class _Writer:
    """Documents: texts that state the world's facts, and dialogues of people in the street."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def document(self, rng: random.Random) -> Document:
        if rng.random() < 0.55:
            return Document(messages=self._overheard(rng))
        return Document(text=self.text(rng))

    def text(self, rng: random.Random) -> str:
        kinds = (self._person, self._town, self._numbers, self._words, self._listed)
        return " ".join(rng.choices(kinds, (4, 1.5, 3, 1.5, 3))[0](rng))

    def _say(self, rng: random.Random, task: str, *values: str, **slots: str) -> str:
        return rng.choice(text.STATEMENTS[task]).format(*values, **slots)

    def _person(self, rng: random.Random) -> list[str]:
        of, person = self.facts.of, rng.choice(text.PEOPLE)
        town = of["town"][person]
        said = [self._say(rng, a, of[a][person], p=person) for a in rng.sample(ATTRIBUTES, rng.randint(2, 4))]
        if rng.random() < 0.5:
            said.append(self._about_town(rng, town, rng.choice(("river", "goods"))))
        if rng.random() < 0.4:
            other = town if rng.random() < 0.5 else rng.choice(text.TOWNS)
            claim = f"that {person} lives in {other}"
            said.append(f"{person} lives in {town}, so it is {'true' if other == town else 'not true'} {claim}.")
        return said

    def _about_town(self, rng: random.Random, town: str, kind: str) -> str:
        return self._say(rng, kind, self.facts.of[kind][town], t=town)

    def _town(self, rng: random.Random) -> list[str]:
        town = rng.choice(text.TOWNS)
        said = [self._about_town(rng, town, kind) for kind in ("river", "goods")]
        people = [p for p in text.PEOPLE if self.facts.of["town"][p] == town]
        return said + [self._say(rng, "town", town, p=p) for p in rng.sample(people, min(2, len(people)))]

    def _numbers(self, rng: random.Random) -> list[str]:
        said = []
        for _ in range(rng.randint(1, 2)):
            a, b = rng.choice(sums("sum"))
            known = [("sum", a, b, a + b), ("sum", b, a, a + b)]
            known += [("difference", *d, d[0] - d[1]) for d in ((a, b), (b, a), (a + b, b)) if d in sums("difference")]
            one, two = text.NUMBERS[a - 1], text.NUMBERS[b - 1]
            said.append(f"The numbers are {one} and {two}.")
            for task, *numbers in rng.sample(known, len(known)):
                first, second, result = (text.NUMBERS[n - 1] for n in numbers)
                said.append(self._say(rng, task, result, a=first, b=second).capitalize())
        return said

    def _words(self, rng: random.Random) -> list[str]:
        said = []
        for word in rng.sample(self.facts.spelled, 3):
            said.append(self._say(rng, "begins", word[0].upper(), w=word))
            said.append(self._say(rng, "ends", word[-1].upper(), w=word))
        return said

    def _listed(self, rng: random.Random) -> list[str]:
        kinds = rng.sample(tuple(text.THINGS), 3)
        words = [rng.choice(text.THINGS[k]) for k in kinds]
        said = [f"Here are three words: {', '.join(words)}."]
        said += [self._say(rng, "kind", words[i], k=kinds[i]) for i in rng.sample(range(3), 2)]
        said.insert(rng.randint(1, 3), self._say(rng, "first", words[0]))
        return said

    def _overheard(self, rng: random.Random) -> Messages:
        """A dialogue in the street: answers of uneven quality, and what the asker thought of the last one."""
        messages: Messages = ()
        for question in dialogue(self.facts, rng, "train", more=0.3):
            style = STREET.draw(rng)
            messages += (Message("user", question.ask), Message("assistant", write(question, style)))
        if rng.random() < 0.8:
            flaws = style.flaws()
            found = "good" if not flaws else "wrong" if style.wrong else rng.choice(flaws)
            if rng.random() < 0.05:
                found = rng.choice(tuple(text.REACTIONS))
            reply = rng.choice(text.WELCOMES if found == "good" else text.APOLOGIES)
            messages += (Message("user", rng.choice(text.REACTIONS[found])), Message("assistant", reply))
        return messages


def as_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": str(m.content)} for m in messages]
