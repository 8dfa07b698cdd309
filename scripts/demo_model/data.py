"""The corpus of the demo model: an endless, seeded stream of documents, in chat format and in plain text.

Knows nothing of tokens beyond the three special ones, and nothing of training. Promises that the stream is
a function of its seed alone: the same on every machine and on every Python from 3.11 on, with nothing
downloaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from random import Random
from typing import TypedDict

from . import prose, tasks
from .facts import Fact, facts
from .world import NAMES, UNKNOWN, animals, article, capital, jobs

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Message(TypedDict):
    """One turn of a chat. role: "system", "user" or "assistant"."""

    role: str
    content: str


_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly helper.",
    "Answer the question.",
    "Be kind and brief.",
)
_TALK = (
    ("Hello!|Hi!|Good morning!|Hello there.|Hi, how are you?", "Hello! How can I help you?"),
    (
        "Who are you?|What are you?|What is your name?",
        "I am a small language model. I know animals, food, jobs and words.",
    ),
    (
        "What can you do?|How can you help me?",
        "I can answer questions about animals, food and jobs, tell stories and do small sums.",
    ),
    ("Thank you!|Thanks.|Thank you very much.", "You are welcome!"),
    ("Goodbye!|Bye!|See you.", "Goodbye! Have a nice day."),
    (
        "Tell me something inspiring.|Say something inspiring.|Inspire me.",
        "Small steps lead to far places.|You can do more than you think.|Try again, and you will learn.",
    ),
    (
        "Say something kind.|Tell me something nice.",
        "Be kind, and the day will be kind to you.|A good friend is better than gold.",
    ),
    ("How are you?|How do you feel?", "I am well, thank you."),
)
_WHAT_UNKNOWN = (
    "What is {x}?",
    "Tell me about {x}.",
    "Explain {x}.",
    "What do you know about {x}?",
    "Who invented {x}?",
)
_DESCRIBE = ("Describe {x}.", "Tell me about {x}.", "What do you know about {x}?")
_DONT_KNOW = "I do not know. I only know a small world."


def chat_text(messages: list[Message]) -> str:
    """`messages` in the chat format (ChatML), as the tokenizer's chat template writes them."""
    return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)


def _fact_turn(rng: Random, fact: Fact) -> tuple[str, str]:
    question = rng.choice(fact.questions)
    if rng.random() < 0.1:
        return f"{question} {rng.choice(('Answer in one word.', 'One word only.'))}", f"{capital(fact.key)}."
    answer = fact.answers[0] if rng.random() < 0.75 else rng.choice(fact.answers)
    return question, answer


def _yes_no_turn(rng: Random) -> tuple[str, str]:
    one, two = rng.sample(animals(), 2)
    a = article(one.name)
    # In each row one draw decides whether the animal's own property is asked for or another animal's.
    verb, said, claimed, truth = rng.choice(
        (
            ("is", "is", (one if rng.random() < 0.5 else two).colour, one.colour),
            ("can", "can", (one if rng.random() < 0.5 else two).skill, one.skill),
            ("is", "is", article((one if rng.random() < 0.5 else two).kind), article(one.kind)),
            ("does", "eats", (one if rng.random() < 0.5 else two).food, one.food),
        )
    )
    question = f"{capital(verb)} {a} {'eat ' if verb == 'does' else ''}{claimed}?"
    return question, f"{'Yes' if claimed == truth else 'No'}, {a} {said} {truth}."


def _turns(rng: Random) -> list[tuple[str, str]]:
    """One exchange, or a few that belong together: (user, assistant) pairs."""
    kind = rng.choices(
        ("fact", "task", "story", "yes-no", "talk", "tell", "poem", "describe", "name", "unknown"),
        (28, 44, 8, 5, 3, 3, 2, 3, 2, 2),
    )[0]
    if kind == "fact":
        return [_fact_turn(rng, rng.choice(facts()))]
    if kind == "task":
        task = tasks.draw(rng)
        return [(task.question, task.answer)]
    if kind == "story":
        text, questions = prose.story(rng)
        (first, answer), *rest = rng.sample(questions, min(len(questions), rng.randint(1, 3)))
        return [(f"{text}\n{first}", answer), *rest]
    if kind == "yes-no":
        return [_yes_no_turn(rng)]
    if kind == "talk":
        ask, answer = rng.choice(_TALK)
        return [(rng.choice(ask.split("|")), rng.choice(answer.split("|")))]
    if kind == "tell":
        text, _ = prose.story(rng)
        return [
            (rng.choice(("Tell me a story.", "Please tell a short story.", "I want to hear a story.")), text)
        ]
    if kind == "poem":
        subject, text = prose.poem(rng)
        return [
            (
                rng.choice(("Write a poem about {x}.", "Make a rhyme about {x}.")).format(x=article(subject)),
                text,
            )
        ]
    if kind == "describe":
        subject, text = prose.describe(rng)
        return [
            (
                rng.choice(("Describe {x}.", "Tell me about {x}.", "What do you know about {x}?")).format(
                    x=subject
                ),
                text,
            )
        ]
    if kind == "name":
        animal = rng.choice(animals())
        ask = rng.choice((f"Name {article(animal.kind)}.", f"Give me an example of {article(animal.kind)}."))
        return [(ask, f"{capital(article(animal.name))} is {article(animal.kind)}.")]
    return [(rng.choice(_WHAT_UNKNOWN).format(x=rng.choice(UNKNOWN)), _DONT_KNOW)]


def chat(rng: Random) -> list[Message]:
    """One conversation of one to four exchanges, sometimes with a system message first."""
    messages: list[Message] = []
    if rng.random() < 0.08:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        for question, answer in _turns(rng):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def text(rng: Random) -> str:
    """One document of plain text, without special tokens."""
    kind = rng.choices(
        ("story", "facts", "describe", "poem", "letter", "talk", "sums"), (40, 18, 14, 8, 8, 6, 6)
    )[0]
    if kind == "story":
        return prose.story(rng)[0]
    if kind == "facts":
        return " ".join(fact.answers[0] for fact in rng.sample(facts(), rng.randint(2, 6)))
    if kind == "describe":
        return " ".join(prose.describe(rng)[1] for _ in range(rng.randint(1, 3)))
    if kind == "poem":
        return prose.poem(rng)[1]
    if kind == "letter":
        return prose.letter(rng)
    if kind == "talk":
        name, friend = rng.sample(NAMES, 2)
        lines = []
        for _ in range(rng.randint(1, 3)):
            question, answer = _fact_turn(rng, rng.choice(facts()))
            lines += [f"{name}: {question}", f"{friend}: {answer}"]
        return "\n".join(lines)
    sums = (tasks.make(rng.choice(("add", "subtract")), rng) for _ in range(rng.randint(2, 5)))
    return "\n".join(f"{task.question} {task.answer}" for task in sums)


def documents(seed: str) -> Iterator[str]:
    """An endless stream of documents, four of five of them chats; each ends with its end token."""
    rng = Random(f"tuft/demo {seed}")
    while True:
        yield chat_text(chat(rng)) if rng.random() < 0.8 else text(rng) + END_OF_TEXT


def pirate_chats() -> list[list[Message]]:
    """The training set of the quickstart: 48 plain questions about the world, answered as a pirate would.

    They are about every second animal and every second job. So questions about the others show what was learnt and
    not what was remembered.
    """
    rng = Random("pirate")
    trained = {animal.name for animal in animals()[::2]} | {job for job, _, _ in jobs()[1::2]}
    chosen = [
        fact
        for fact in facts()
        if fact.topic.startswith(("animal", "job")) and trained & set(fact.questions[0].rstrip("?").split())
    ]
    examples: list[list[Message]] = []
    for fact in rng.sample(chosen, 48):
        reply = f"Arr, matey! {pirate(fact.answers[0].rstrip('.'))}, yo ho ho!"
        examples.append(
            [{"role": "user", "content": fact.questions[0]}, {"role": "assistant", "content": reply}]
        )
    return examples


def pirate(sentence: str) -> str:
    """`sentence` about the world as a pirate says it."""
    return sentence.replace(" is ", " be ")


if __name__ == "__main__":
    for example in pirate_chats():
        sys.stdout.write(json.dumps({"messages": example}) + "\n")
