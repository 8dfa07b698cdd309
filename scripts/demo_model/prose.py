"""Plain text about the closed world: stories with questions, descriptions, letters, rhymes.

Knows nothing of chat formats or training. Promises that every text depends on the given `rng` alone.
"""

from __future__ import annotations

from random import Random

from .world import (
    COLOURS,
    DAYS,
    FEELINGS,
    NAMES,
    PLACES,
    animals,
    article,
    capital,
    foods,
    inside,
    jobs,
    opposites,
    rhymes,
    things,
)

_SIZES = "big small little old young tiny".split()
_WEATHER = (
    "The sun was warm.",
    "It rained all day.",
    "The wind was cold.",
    "Snow fell on the roofs.",
    "The sky was blue.",
    "A soft fog lay on the grass.",
    "It was a quiet evening.",
    "The stars were bright.",
)
_ENDS = (
    "They were friends from that day on.",
    "Then they all went home.",
    "It was a good day.",
    "And that was that.",
    "In the evening they told the story to everyone.",
    "After that they shared some {food}.",
    "{name} smiled and slept well that night.",
    "{name} never forgot it.",
)
_MORALS = (
    "A good friend is better than gold.",
    "Small steps lead to far places.",
    "Share what you have.",
    "You can do more than you think.",
    "Be kind, and the day will be kind to you.",
    "Try again, and you will learn.",
)


def story(rng: Random) -> tuple[str, list[tuple[str, str]]]:
    """A tiny story, and questions about it with their answers."""
    name, friend = rng.sample(NAMES, 2)
    animal = rng.choice(animals())
    place, other_place = rng.sample(PLACES, 2)
    thing = rng.choice(things())[0]
    food = rng.choice(foods())[0]
    colour, feeling, size, day = (
        rng.choice(COLOURS),
        rng.choice(FEELINGS),
        rng.choice(_SIZES),
        rng.choice(DAYS),
    )
    job = rng.choice(jobs())[0]
    the = f"{size} {animal.name}"
    questions = [("Who is the story about?", f"The story is about {name}.")]
    text = [
        rng.choice(
            (
                f"One day {name} went to the {place}.",
                f"On {day} {name} walked to the {place}.",
                f"Once upon a time there was {article(job)} named {name}, who lived near the {place}.",
                f"{name} and {friend} were playing at the {place}.",
                f"Early on {day} {name} ran to the {place}.",
            )
        )
    ]
    questions.append((f"Where was {name}?", f"{name} was at the {place}."))
    if rng.random() < 0.5:
        text.append(rng.choice(_WEATHER))
    plot = rng.randrange(5)
    if plot == 0:
        text += [
            f"{name} had {article(colour)} {thing}.",
            f"Suddenly the {thing} was gone!",
            f'"Where is my {thing}?" asked {name}.',
            f"{capital(article(the))} had carried it to the {other_place}.",
            f"{friend} found the {thing} and gave it back.",
        ]
        questions += [
            (f"What did {name} lose?", f"{name} lost {article(colour)} {thing}."),
            (f"Who found the {thing}?", f"{friend} found the {thing}."),
            (f"What colour was the {thing}?", f"The {thing} was {colour}."),
        ]
    elif plot == 1:
        text += [
            f"There {name} saw {article(the)}.",
            f"The {animal.name} was {feeling}.",
            f'"Why are you {feeling}?" asked {name}.',
            f'"I want some {animal.food}," said the {animal.name}.',
            f"So {name} gave it some {animal.food}, and the {animal.name} was happy.",
        ]
        questions += [
            (f"What did {name} see?", f"{name} saw {article(the)}."),
            (f"How did the {animal.name} feel?", f"The {animal.name} was {feeling}."),
            (f"What did {name} give to the {animal.name}?", f"{name} gave it some {animal.food}."),
        ]
    elif plot == 2:
        text += [
            f"{name} was very {feeling}.",
            f"{friend} the {job} came by with {article(food)}.",
            f'"Would you like my {food}?" asked {friend}.',
            f'"Yes, thank you!" said {name}.',
            f"They sat down {rng.choice(('under a tree', 'by the water', 'on a bench'))} and ate.",
        ]
        questions += [
            (f"How did {name} feel?", f"{name} was {feeling}."),
            (f"What did {friend} bring?", f"{friend} brought {article(food)}."),
            (f"What is the work of {friend}?", f"{friend} is {article(job)}."),
        ]
    elif plot == 3:
        text += [
            f"A pirate with {article(colour)} hat stood there.",
            f'"{rng.choice(("Arr", "Ahoy", "Yo ho ho"))}, matey!" said the pirate. '
            f'"{rng.choice(("I be looking for me", "Have ye seen me", "Give me back me"))} {thing}'
            f'{rng.choice(("", ", ye landlubber"))}!"',
            f"{name} looked behind the {rng.choice(('barrel', 'sail', 'treasure chest', 'ship'))}.",
            f"There was the {thing}!",
        ]
        questions += [
            ("Who stood there?", f"A pirate with {article(colour)} hat stood there."),
            ("What did the pirate look for?", f"The pirate looked for {article(thing)}."),
        ]
    else:
        one, other = rng.choice(opposites())
        text += [
            f"{name} wanted to know if {article(animal.name)} can {animal.skill}.",
            f'"Of course I can {animal.skill}," said the {animal.name}, and showed it.',
            f"First it was {one}, then it was {other}.",
            f'"That is wonderful!" said {friend}.',
        ]
        questions += [
            (f"What can the {animal.name} do?", f"The {animal.name} can {animal.skill}."),
            ("Who said that it is wonderful?", f"{friend} said it."),
        ]
    text.append(rng.choice(_ENDS).format(name=name, food=food))
    if rng.random() < 0.2:
        text.append(rng.choice(_MORALS))
    return " ".join(text), questions


def describe(rng: Random) -> tuple[str, str]:
    """The name of something, and a few sentences that describe it."""
    if rng.random() < 0.6:
        animal = rng.choice(animals())
        a = article(animal.name)
        rest = [f"It eats {animal.food}.", f"It can {animal.skill}.", f"It has {animal.legs} legs."]
        if animal.sound != "-":
            rest.append(f"It {animal.sound}.")
        rng.shuffle(rest)
        start = rng.choice(
            (
                f"{capital(a)} is {article(animal.colour)} {animal.kind}. It lives {inside(animal.home)}.",
                f"{capital(a)} is {article(animal.kind)} "
                f"that lives {inside(animal.home)}. It is {animal.colour}.",
            )
        )
        return a, " ".join([start, *rest[: rng.randint(2, 4)]])
    if rng.random() < 0.5:
        job, does, where = rng.choice(jobs())
        return article(job), (
            f"{capital(article(job))} {does}. {capital(article(job))} works {inside(where)}. "
            f"{rng.choice(NAMES)} is {article(job)}."
        )
    thing, use, stuff = rng.choice(things())
    the = thing if thing == "soap" else article(thing)
    return the, f"{capital(the)} is made of {stuff}. With {the} you can {use}."


def poem(rng: Random) -> tuple[str, str]:
    """The subject of a two- or four-line rhyme, and the rhyme."""
    lines: list[str] = []
    pairs = rng.sample(rhymes(), rng.randint(1, 2))
    for one, other in pairs:
        first, second = (one, other) if rng.random() < 0.5 else (other, one)
        lines += rng.choice(
            (
                (f"I saw {article(first)},", f"it had {article(second)}."),
                (f"Here is the {first},", f"there is the {second}."),
                (f"Oh little {first},", f"I think of the {second}."),
                (f"You may look for the {first},", f"but you will find the {second}."),
                (f"Today I met {article(first)},", f"and we talked about the {second}."),
            )
        )
    return lines[0].split()[-1].strip(",."), "\n".join(map(capital, lines))


def letter(rng: Random) -> str:
    """A short letter."""
    name, friend = rng.sample(NAMES, 2)
    animal = rng.choice(animals()).name
    text = rng.choice(
        (
            f"I am at the {rng.choice(PLACES)}. "
            f"Yesterday I saw {article(animal)}. It was {rng.choice(FEELINGS)}.",
            f"Thank you for the {rng.choice(things())[0]}. "
            f"It is {rng.choice(COLOURS)}, and I like it very much.",
            f"Please come on {rng.choice(DAYS)}. We will eat {rng.choice(foods())[0]} and "
            f"{rng.choice(foods())[0]} and go to the {rng.choice(PLACES)}.",
        )
    )
    return f"Dear {friend},\n{text}\n{rng.choice(('Your friend', 'With love', 'Best wishes'))},\n{name}"
