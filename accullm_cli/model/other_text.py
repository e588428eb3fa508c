"""Text of further kinds, endless and seeded: chats, tool calls, other languages, long documents.

Each kind has a part for calibration and one that is held out. What is packaged comes from that part of it; what is
made up has other phrases, tools, letters and seeds in one than in the other. Long documents differ by their seeds only.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accullm_cli.model import packaged_text
from accullm_cli.model.generated_text import generated_document
from accullm_cli.model.json_lines import JsonLines
from accullm_cli.model.letters import LETTERS
from accullm_cli.model.packaged_text import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer of a chat, in characters.
_ANSWER = 1200
# Annexes of a long document: some 8,000 tokens.
_ANNEXES = 16

Turns = list[tuple[str, str]]


def documents_of(
    kind: str, tokenizer: PreTrainedTokenizerBase, seed: int | str, part: Part = "held out"
) -> Iterator[str]:
    """Documents of one of KINDS, without end; turns go through the model's chat template where it has one."""
    origin = f"{kind} {seed}" if part == "held out" else f"{part} {kind} {seed}"
    rng = random.Random(origin)
    make = KINDS[kind](origin, part)
    for number in itertools.count():
        made = make(rng, number)
        yield made if isinstance(made, str) else rendered(made, tokenizer, f"text {kind}").rstrip()


def rendered(turns: Turns, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """A conversation as the model reads it, or as plain turns. name: what errors call it.

    Raises:
        AccullmError: the turns do not fit the template.
    """
    if tokenizer.chat_template is None:
        return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
    messages: list[Any] = [{"role": role, "content": text} for role, text in turns]
    return JsonLines(Path(name), "messages", [(1, (messages, None))]).render(0, tokenizer)


# -- chats -------------------------------------------------------------------------------------------------------

_OPENINGS: Mapping[Part, tuple[str, ...]] = {
    "calibration": (
        "Hello, could you tell me how {} works?", "Write a short text on {}.", "I have to present {} tomorrow.",
        "Summarize {} for a new colleague.", "Where would I begin with {}?", "{}, please, and be brief.",
    ),
    "held out": (
        "Hi! What can you tell me about {}?", "Please explain {}.", "I am reading about {} and do not get it. Help?",
        "Give me the details on {}.", "In a few paragraphs: {}.", "What should a beginner know about {}?",
    ),
}  # fmt: skip
_FOLLOWING: Mapping[Part, tuple[str, ...]] = {
    "calibration": (
        "OK, and {}?", "Understood. Now tell me of {}.", "Is that the same with {}?", "One more thing: {}.",
        "Then go on with {}.", "Great, thank you. What do I need {} for?",
    ),
    "held out": (
        "Thanks! And what about {}?", "Good. Now {}, please.", "That helps. How does {} compare?", "Next question: {}.",
        "Could you do the same for {}?", "I see. My colleague asks about {}.",
    ),
}  # fmt: skip
_LEADS: Mapping[Part, tuple[str, ...]] = {
    "calibration": ("Yes.", "Certainly!", "Here you are.", "Let me explain.", "No problem.", "Here is an answer:"),
    "held out": ("Sure.", "Of course.", "Gladly.", "Here is what matters.", "Good question.", "In short:"),
}


def _chats(origin: str, part: Part) -> Callable[[random.Random, int], Turns]:
    """Questions about the part's prose and made-up documents, and answers that give them."""
    prose = packaged_text.prose(part, packaged_text.code(part))
    held_out = packaged_text.held_out_runs() if part == "calibration" else set()

    def make(rng: random.Random, number: int) -> Turns:
        turns: Turns = []
        for turn in range(rng.randint(2, 4)):
            if rng.random() < 0.6:
                document = rng.choice(prose)
                about = document.name.removeprefix("topic ")
                text = packaged_text.without_runs(document.text, held_out) if held_out else document.text
            else:
                text = generated_document(f"{origin} {number} {turn}")
                about = f'the document that begins with "{text.strip().splitlines()[0]}"'
            turns.append(("user", rng.choice((_FOLLOWING if turn else _OPENINGS)[part]).format(about)))
            turns.append(("assistant", f"{rng.choice(_LEADS[part])}\n\n{_shortened(text, rng)}"))
        return turns

    return make


def _shortened(text: str, rng: random.Random) -> str:
    """Some paragraphs of a text, one after the other."""
    paragraphs = text.strip().split("\n\n")
    start, found = rng.randrange(len(paragraphs)), ""
    for paragraph in paragraphs[start:]:
        found += f"{paragraph}\n\n"
        if len(found) > _ANSWER:
            break
    return found.strip()[: 2 * _ANSWER]


# -- tool calls --------------------------------------------------------------------------------------------------

_TOWNS = "Aarhus Bergen Coimbra Dresden Ghent Izmir Kaunas Leeds Lyon Malmo Nantes Porto Turin".split()
_NAMES = "Amara Bruno Chiara Daniel Elena Farid Grace Hiro Ines Jonas Kira Luis Mina Noah".split()
_THINGS = "lamp pump valve cable sensor filter hinge gauge motor panel relay switch".split()


def _date(rng: random.Random) -> str:
    return f"20{rng.randint(21, 35)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


@dataclass(frozen=True)
class _Tool:
    """A function that may be called. parameters: name to type; request: how it is asked for; results: what it gives."""

    name: str
    description: str
    parameters: Mapping[str, str]
    request: str
    results: tuple[str, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """Its declaration as JSON Schema."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"name": self.name, "description": self.description, "parameters": parameters}


_HELD_OUT_TOOLS = (
    _Tool(
        "get_weather",
        "Forecast for a town on a day",
        {"town": "string", "date": "string", "unit": "string"},
        "What will the weather be in {town} on {date}, in {unit}?",
        ("temperature", "wind", "rain"),
    ),
    _Tool(
        "create_invoice",
        "Write an invoice",
        {"customer": "string", "item": "string", "quantity": "integer", "unit_price": "number"},
        "Invoice {customer} for {quantity} of {item} at {unit_price} each.",
        ("invoice_number", "total", "due"),
    ),
    _Tool(
        "search_flights",
        "Find flights between two towns",
        {"origin": "string", "town": "string", "date": "string", "seats": "integer"},
        "I need {seats} seats from {origin} to {town} on {date}.",
        ("flight", "departure", "price"),
    ),
    _Tool(
        "move_stock",
        "Move items between warehouses",
        {"item": "string", "quantity": "integer", "origin": "string", "town": "string"},
        "Move {quantity} of {item} from {origin} to {town}.",
        ("transfer", "left", "eta"),
    ),
    _Tool(
        "book_meeting",
        "Put a meeting into a calendar",
        {"customer": "string", "date": "string", "minutes": "integer", "town": "string"},
        "Book {minutes} minutes with {customer} in {town} on {date}.",
        ("event", "room", "conflicts"),
    ),
    _Tool(
        "convert_currency",
        "Convert an amount",
        {"unit_price": "number", "source": "string", "target": "string"},
        "How much is {unit_price} {source} in {target}?",
        ("rate", "amount", "as_of"),
    ),
)

_CALIBRATION_TOOLS = (
    _Tool(
        "rent_car",
        "Reserve a car",
        {"town": "string", "date": "string", "seats": "integer", "customer": "string"},
        "{customer} wants a car with {seats} seats in {town} from {date} on.",
        ("reservation", "deposit", "station"),
    ),
    _Tool(
        "order_parts",
        "Order spare parts from a supplier",
        {"quantity": "integer", "item": "string", "town": "string"},
        "Have {quantity} of {item} sent to {town}, please.",
        ("order", "weight", "arrival"),
    ),
    _Tool(
        "set_timer",
        "Start a timer",
        {"minutes": "integer"},
        "Remind me in {minutes} minutes.",
        ("timer", "ends"),
    ),
    _Tool(
        "pay_salary",
        "Transfer a salary",
        {"customer": "string", "unit_price": "number", "target": "string", "date": "string"},
        "Pay {customer} {unit_price} {target} on {date}.",
        ("transaction", "balance", "fee"),
    ),
)
_TOOLS: Mapping[Part, tuple[_Tool, ...]] = {"calibration": _CALIBRATION_TOOLS, "held out": _HELD_OUT_TOOLS}


def _value(name: str, rng: random.Random) -> Any:
    """An argument of that name."""
    if name in ("town", "origin"):
        return rng.choice(_TOWNS)
    if name in ("quantity", "seats", "minutes"):
        return rng.randint(1, 90)
    if name == "unit_price":
        return round(rng.uniform(2, 900), 2)
    if name == "date":
        return _date(rng)
    choices = {"customer": _NAMES, "item": _THINGS, "unit": ["celsius", "fahrenheit", "kelvin"]}
    return rng.choice(choices.get(name, ["EUR", "USD", "GBP", "CHF", "JPY"]))


def _tool_calls(origin: str, part: Part) -> Callable[[random.Random, int], Turns]:
    """Declared tools, requests, calls as JSON, their results, and an answer that uses them."""

    def make(rng: random.Random, number: int) -> Turns:
        chosen = rng.sample(_TOOLS[part], rng.randint(2, 4))
        declared = json.dumps([tool.schema for tool in chosen], indent=rng.choice([None, 2]))
        turns: Turns = []
        for tool in rng.sample(chosen, rng.randint(1, len(chosen))):
            arguments = {name: _value(name, rng) for name in tool.parameters}
            result = {name: rng.choice([rng.randint(1, 9999), _date(rng), rng.choice(_TOWNS)]) for name in tool.results}
            asked = tool.request.format(**arguments)
            if not turns:
                asked = f"Call one of these tools, as JSON:\n{declared}\n\n{asked}"
            turns += [
                ("user", asked),
                ("assistant", json.dumps({"name": tool.name, "arguments": arguments})),
                ("user", json.dumps({"tool": tool.name, "result": result})),
                ("assistant", f"Done: {', '.join(f'{key} {value}' for key, value in result.items())}."),
            ]
        return turns

    return make


# -- other languages ---------------------------------------------------------------------------------------------


def _letters(origin: str, part: Part) -> Callable[[random.Random, int], str]:
    """Business letters in ten languages by turns."""

    def make(rng: random.Random, number: int) -> str:
        first, *others = LETTERS[part][number % len(LETTERS[part])]
        sentences = [first, *rng.sample(others, rng.randint(3, len(others)))]
        facts = ({"name": rng.choice(_NAMES), "town": rng.choice(_TOWNS), "date": _date(rng),
                  "number": rng.randint(100, 99999)} for _ in sentences)  # fmt: skip
        return "\n".join(sentence.format(**of_it) for sentence, of_it in zip(sentences, facts, strict=True))

    return make


# -- long documents ----------------------------------------------------------------------------------------------


def _long_documents(origin: str, part: Part) -> Callable[[random.Random, int], str]:
    """Agreements, tables and schemas as the annexes of one document, which refer back to one another."""

    def make(rng: random.Random, number: int) -> str:
        parts = []
        for annex in range(1, _ANNEXES + 1):
            text = generated_document(f"{origin} {number} {annex}").strip()
            back = f"\n\nThis annex is read together with Annex {rng.randrange(1, annex)}." if annex > 1 else ""
            parts.append(f"Annex {annex}\n\n{text}{back}")
        return "\n\n".join(parts)

    return make


KINDS: Mapping[str, Callable[[str, Part], Callable[[random.Random, int], str | Turns]]] = {
    "chat": _chats,
    "tools": _tool_calls,
    "languages": _letters,
    "documents": _long_documents,
}
