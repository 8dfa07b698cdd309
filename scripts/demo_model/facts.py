"""What is true in the closed world, as questions with their answers.

Knows the tables of `world.py` and nothing of chat formats, tokens or training. Promises that `facts()` is
the same on every call and that each fact carries one key word by which an answer to any of its questions
can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .world import (
    DAYS,
    MONTHS,
    Animal,
    animals,
    article,
    capital,
    foods,
    inside,
    jobs,
    opposites,
    plurals,
    rhymes,
    things,
)


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world.

    questions: ways to ask for it. answers: ways to say it, the usual one first. key: the word that a right
    answer contains. topic: the table that it comes from.
    """

    topic: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    key: str


def _animal_facts(animal: Animal) -> list[Fact]:
    a = article(animal.name)

    def fact(topic: str, key: str, questions: str, answers: str) -> Fact:
        return Fact(topic, tuple(questions.split("|")), tuple(answers.split("|")), key)

    where = inside(animal.home)
    facts = [
        fact(
            "animal colour",
            animal.colour,
            f"What colour is {a}?|Which colour does {a} have?|Tell me the colour of {a}.|"
            f"What is the colour of {a}?",
            f"{capital(a)} is {animal.colour}.|It is {animal.colour}.|{capital(animal.colour)}.",
        ),
        fact(
            "animal food",
            animal.food,
            f"What does {a} eat?|What food does {a} like?|What do you feed {a}?|Tell me what {a} eats.",
            f"{capital(a)} eats {animal.food}.|It eats {animal.food}.|{capital(animal.food)}.",
        ),
        fact(
            "animal home",
            animal.home,
            f"Where does {a} live?|Where is the home of {a}?|Where can I find {a}?|Tell me where {a} lives.",
            f"{capital(a)} lives {where}.|It lives {where}.|{capital(where)}.",
        ),
        fact(
            "animal kind",
            animal.kind,
            f"What kind of animal is {a}?|What is {a}?|Which group does {a} belong to?",
            f"{capital(a)} is {article(animal.kind)}.|It is {article(animal.kind)}.",
        ),
        fact(
            "animal legs",
            animal.legs,
            f"How many legs does {a} have?|Tell me how many legs {a} has.|Count the legs of {a}.",
            f"{capital(a)} has {animal.legs} legs.|It has {animal.legs} legs.",
        ),
        fact(
            "animal skill",
            animal.skill,
            f"What can {a} do?|What is {a} good at?|What can {a} do well?",
            f"{capital(a)} can {animal.skill}.|It can {animal.skill}.",
        ),
    ]
    if animal.sound != "-":
        facts.append(
            fact(
                "animal sound",
                animal.sound,
                f"What sound does {a} make?|How does {a} sound?|What noise does {a} make?",
                f"{capital(a)} {animal.sound}.|It {animal.sound}.",
            )
        )
    return facts


def _other_facts() -> list[Fact]:
    facts = []
    for food, kind, colour, taste, source in foods():
        a, where = article(food), inside(source)
        verb = "grows" if kind in {"fruit", "vegetable"} else "comes from"
        place = where if verb == "grows" else f"the {source}"
        ask = f"Where does {a} grow?" if verb == "grows" else f"Where does {food} come from?"
        the = capital(a if verb == "grows" or food in {"cake", "cookie"} else food)
        facts += [
            Fact(
                "food colour",
                (f"What colour is {the.lower()}?", f"Tell me the colour of {the.lower()}."),
                (f"{the} is {colour}.", f"It is {colour}."),
                colour,
            ),
            Fact(
                "food taste",
                (f"How does {the.lower()} taste?", f"What is the taste of {the.lower()}?"),
                (f"{the} tastes {taste}.", f"It tastes {taste}."),
                taste,
            ),
            Fact(
                "food source",
                (ask if verb == "grows" else ask.replace(food, the.lower()),),
                (f"{the} {verb} {place}.", f"It {verb} {place}."),
                source,
            ),
        ]
    for job, does, where in jobs():
        a = article(job)
        facts += [
            Fact(
                "job",
                (f"What does {a} do?", f"What is the work of {a}?", f"Tell me what {a} does."),
                (f"{capital(a)} {does}.",),
                does.split()[-1],
            ),
            Fact(
                "job place",
                (f"Where does {a} work?", f"Where can I find {a}?"),
                (f"{capital(a)} works {inside(where)}.",),
                where,
            ),
            Fact(
                "job name",
                (f"Who {does}?", f"Which person {does}?"),
                (f"{capital(a)} {does}.", f"{capital(a)}."),
                job,
            ),
        ]
    for thing, use, stuff in things():
        a = article(thing)
        the = thing if thing == "soap" else a
        facts += [
            Fact(
                "thing use",
                (f"What is {the} for?", f"What do you do with {the}?", f"Why do I need {the}?"),
                (f"With {the} you can {use}.", f"You can {use} with it."),
                use.split()[-1],
            ),
            Fact(
                "thing material",
                (f"What is {the} made of?", f"Which material is {the} made of?"),
                (f"{capital(the)} is made of {stuff}.", f"It is made of {stuff}."),
                stuff,
            ),
            Fact(
                "thing name",
                (f"What do I need to {use}?", f"With what can I {use}?"),
                (f"You need {the}.", f"{capital(the)}."),
                thing,
            ),
        ]
    for one, other in opposites():
        for word, answer in ((one, other), (other, one)):
            facts.append(
                Fact(
                    "opposite",
                    (f"What is the opposite of {word}?", f"Give the opposite of {word}."),
                    (f"The opposite of {word} is {answer}.", f"{capital(answer)}."),
                    answer,
                )
            )
    for one, other in rhymes():
        for word, answer in ((one, other), (other, one)):
            facts.append(
                Fact(
                    "rhyme",
                    (f"What rhymes with {word}?", f"Give me a rhyme for {word}."),
                    (f"{capital(answer)} rhymes with {word}.",),
                    answer,
                )
            )
    for word, answer in plurals():
        facts.append(
            Fact(
                "plural",
                (f"What is the plural of {word}?", f"One {word}, two what?"),
                (f"The plural of {word} is {answer}.",),
                answer,
            )
        )
    for cycle, unit in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(cycle):
            after, before = cycle[(i + 1) % len(cycle)], cycle[i - 1]
            facts += [
                Fact(
                    "calendar",
                    (f"Which {unit} comes after {name}?", f"What {unit} follows {name}?"),
                    (f"{after} comes after {name}.",),
                    after,
                ),
                Fact(
                    "calendar",
                    (f"Which {unit} comes before {name}?",),
                    (f"{before} comes before {name}.",),
                    before,
                ),
            ]
    return facts


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the world, in table order."""
    return tuple([fact for animal in animals() for fact in _animal_facts(animal)] + _other_facts())
