"""Tasks whose answers a program can check: small arithmetic, letters and words, sequences.

Knows nothing of chat formats or training. Promises that `make(name, rng)` depends on `rng` alone and that
one answer is right, so that `reward` can be used as it is for reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .world import LETTER_WORDS

_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()


@dataclass(frozen=True)
class Task:
    """A question in words and the one right answer, as the whole reply of the assistant."""

    name: str
    question: str
    answer: str


def reward(task: Task, reply: str) -> float:
    """1.0 where `reply` is the answer of `task` (bar outer white space and a full stop), else 0.0."""
    return float(reply.strip().rstrip(".") == task.answer.rstrip("."))


def _ask(rng: Random, *ways: str, **fields: object) -> str:
    return rng.choice(ways).format(**fields)


def _number(rng: Random) -> int:
    return rng.randrange(10) if rng.random() < 0.65 else rng.randrange(10, 100)


def _add(rng: Random) -> Task:
    a, b = _number(rng), _number(rng)
    question = _ask(
        rng,
        "What is {a} + {b}?",
        "{a} + {b} =",
        "Add {a} and {b}.",
        "Compute {a} + {b}.",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        a=a,
        b=b,
    )
    return Task("add", question, str(a + b))


def _subtract(rng: Random) -> Task:
    b, a = sorted((_number(rng), _number(rng)))
    question = _ask(
        rng,
        "What is {a} - {b}?",
        "{a} - {b} =",
        "Subtract {b} from {a}.",
        "Compute {a} - {b}.",
        "How much is {a} minus {b}?",
        "Take {b} away from {a}.",
        a=a,
        b=b,
    )
    return Task("subtract", question, str(a - b))


def _compare(rng: Random) -> Task:
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    words = ("larger", "bigger", "greater") if larger else ("smaller", "less", "lower")
    question = _ask(
        rng,
        "Which is {word}, {a} or {b}?",
        "Which number is {word}: {a} or {b}?",
        "Is {a} or {b} {word}?",
        word=rng.choice(words),
        a=a,
        b=b,
    )
    return Task("compare", question, str(max(a, b) if larger else min(a, b)))


def _count(rng: Random) -> Task:
    letter, other = rng.sample("abcdefghijklmnopqrstuvwxyz", 2)
    letters = [rng.choice((letter, letter, other)) for _ in range(rng.randint(2, 7))]
    question = _ask(
        rng,
        "How many times do you see {x} in: {row}?",
        "Count the {x} in: {row}",
        "How often is {x} in {row}?",
        x=letter,
        row=" ".join(letters),
    )
    return Task("count", question, str(letters.count(letter)))


def _length(rng: Random) -> Task:
    word = rng.choice(LETTER_WORDS)
    question = _ask(
        rng, "How many letters are in {w}?", "Count the letters of {w}.", "How long is the word {w}?", w=word
    )
    return Task("length", question, str(len(word)))


def _spell(rng: Random) -> Task:
    word = rng.choice(LETTER_WORDS)
    question = _ask(rng, "Spell {w}.", "How do you spell {w}?", "Write the letters of {w}.", w=word)
    return Task("spell", question, " ".join(word))


def _reverse(rng: Random) -> Task:
    word = rng.choice(LETTER_WORDS)
    question = _ask(
        rng, "Reverse {w}.", "Spell {w} backwards.", "Write {w} from the end to the start.", w=word
    )
    return Task("reverse", question, " ".join(reversed(word)))


def _letters(rng: Random, low: int, high: int) -> list[str]:
    return rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(low, high))


def _flip(rng: Random) -> Task:
    letters = _letters(rng, 3, 6)
    question = _ask(
        rng, "Reverse the letters {row}", "Turn around: {row}", "Say {row} backwards.", row=" ".join(letters)
    )
    return Task("flip", question, " ".join(reversed(letters)))


def _sort(rng: Random) -> Task:
    letters = _letters(rng, 3, 4)
    question = _ask(rng, "Sort {row}", "Put in order: {row}", "Sort the letters {row}", row=" ".join(letters))
    return Task("sort", question, " ".join(sorted(letters)))


def _upper(rng: Random) -> Task:
    word = rng.choice(LETTER_WORDS)
    question = _ask(rng, "Write {w} in capital letters.", "Make {w} uppercase.", "Shout {w}.", w=word)
    return Task("upper", question, word.upper())


def _first(rng: Random) -> Task:
    word = rng.choice(LETTER_WORDS)
    question = _ask(rng, "What is the first letter of {w}?", "With which letter does {w} start?", w=word)
    return Task("first", question, word[0])


def _last(rng: Random) -> Task:
    word = rng.choice(LETTER_WORDS)
    question = _ask(rng, "What is the last letter of {w}?", "With which letter does {w} end?", w=word)
    return Task("last", question, word[-1])


def _copy(rng: Random) -> Task:
    words = " ".join(rng.sample(LETTER_WORDS, rng.randint(1, 5)))
    question = _ask(rng, "Repeat: {w}", "Say this again: {w}", "Copy: {w}", w=words)
    return Task("copy", question, words)


def _times(rng: Random) -> Task:
    word, n = rng.choice(LETTER_WORDS), rng.randint(2, 5)
    question = _ask(
        rng, "Say {w} {n} times.", "Write {w} {n} times.", w=word, n=rng.choice((n, _NUMBER_WORDS[n]))
    )
    return Task("times", question, " ".join([word] * n))


def _sequence(rng: Random) -> Task:
    step = rng.choice((1, 1, 2, 2, 3, 5, 10))
    start = rng.randrange(0, 40)
    numbers = [start + step * i for i in range(5)]
    if rng.random() < 0.3:
        numbers.reverse()
    question = _ask(
        rng,
        "What comes next: {row}?",
        "Which number is next: {row}?",
        "Continue: {row}",
        row=" ".join(map(str, numbers[:4])),
    )
    return Task("sequence", question, str(numbers[4]))


def _digit(rng: Random) -> Task:
    n = rng.randrange(len(_NUMBER_WORDS))
    if rng.random() < 0.5:
        return Task("digit", _ask(rng, "Write {n} in words.", "How do you say {n}?", n=n), _NUMBER_WORDS[n])
    return Task(
        "digit", _ask(rng, "Write {n} as a number.", "Which number is {n}?", n=_NUMBER_WORDS[n]), str(n)
    )


def _member(rng: Random) -> Task:
    words = rng.sample(LETTER_WORDS, rng.randint(2, 5))
    word = rng.choice(words) if rng.random() < 0.5 else rng.choice(LETTER_WORDS)
    question = _ask(
        rng,
        "Is {w} in this list: {row}?",
        "Here is a list: {row}. Is {w} in it?",
        w=word,
        row=", ".join(words),
    )
    return Task("member", question, "Yes." if word in words else "No.")


# How often each kind is asked, relative to the others. Arithmetic is kept scarce enough to stay imperfect:
# what the base cannot do yet is what a fine-tuning run can show.
_KINDS: dict[str, tuple[Callable[[Random], Task], int]] = {
    "add": (_add, 14),
    "subtract": (_subtract, 4),
    "compare": (_compare, 3),
    "count": (_count, 3),
    "length": (_length, 2),
    "spell": (_spell, 3),
    "reverse": (_reverse, 2),
    "flip": (_flip, 3),
    "sort": (_sort, 3),
    "upper": (_upper, 2),
    "first": (_first, 2),
    "last": (_last, 2),
    "copy": (_copy, 3),
    "times": (_times, 2),
    "sequence": (_sequence, 4),
    "digit": (_digit, 2),
    "member": (_member, 2),
}
NAMES = tuple(_KINDS)


def make(name: str, rng: Random) -> Task:
    """One task of the kind `name` (one of `NAMES`)."""
    return _KINDS[name][0](rng)


def draw(rng: Random) -> Task:
    """One task of a kind drawn by how often it is to be asked."""
    name = rng.choices(NAMES, [weight for _, weight in _KINDS.values()])[0]
    return make(name, rng)
