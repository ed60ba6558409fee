"""Makes the demo's text and rows: orders in plain words, and their parts picked out.

`python -m pipelines.demo.generate` writes ``corpus.txt``, which the base model is pre-trained on, and
``orders.jsonl``, the data set. Both are shipped; a test holds them equal to what this file makes.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CORPUS = FOLDER / "corpus.txt"
ORDERS = FOLDER / "orders.jsonl"

_NUM_ORDERS = 1600
_NUM_NOTES = 4000

_NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]
_COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey"]
_ITEMS = ["lamps", "chairs", "tables", "cups", "plates", "clocks", "mirrors", "carpets"]
_CITIES = ["Oslo", "Lisbon", "Vienna", "Dublin", "Prague", "Athens", "Madrid", "Bergen"]
_NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo"]

_ORDERS = [
    "Hello, this is {customer}. Please send {count} {colour} {item} to {city}.",
    "{customer} here. I need {count} {colour} {item} in {city}.",
    "Could you deliver {count} {colour} {item} to {city}? My name is {customer}.",
    "We would like {count} {item} in {colour}. Ship them to {city}. Regards, {customer}",
    "I want {count} {colour} {item} at my house in {city}. Thank you, {customer}",
    "An order for {city}: {count} {item}, colour {colour}. Yours, {customer}",
    "{customer} from {city} asks for {count} {colour} {item}.",
    "Is it possible to have {count} {colour} {item} sent to {city}? {customer}",
]
_ANSWER = "customer: {customer}; item: {item}; colour: {colour}; count: {count}; city: {city}"


@dataclass(frozen=True)
class Order:
    """One order; the fields are the parts that the answer names."""

    customer: str
    item: str
    colour: str
    count: str
    city: str


def _draw(draw: random.Random) -> Order:
    return Order(*(draw.choice(words) for words in (_NAMES, _ITEMS, _COLOURS, _NUMBERS, _CITIES)))


def make_corpus() -> str:
    """Orders, each followed by a note that names its parts in any order; one pair a line."""
    draw = random.Random(1)
    lines = []
    for _ in range(_NUM_NOTES):
        words = asdict(_draw(draw))
        parts = [f"{name}: {word}" for name, word in words.items()]
        lines.append(f"{draw.choice(_ORDERS).format(**words)} {'; '.join(draw.sample(parts, len(parts)))}.")
    return "\n".join(lines) + "\n"


def make_orders() -> str:
    """Rows of prompt and completion: an order, and its parts; no order stands twice or in the corpus."""
    draw = random.Random(2)
    corpus = make_corpus()
    rows: dict[str, str] = {}
    while len(rows) < _NUM_ORDERS:
        words = asdict(_draw(draw))
        question = draw.choice(_ORDERS).format(**words)
        if question not in corpus:
            rows[question] = _ANSWER.format(**words)
    return "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows.items())


if __name__ == "__main__":
    CORPUS.write_text(make_corpus(), encoding="utf-8")
    ORDERS.write_text(make_orders(), encoding="utf-8")
