"""Text of further kinds, endless and seeded: chats, tool calls, other languages, long documents.

None of it is in calibration's text: what is packaged comes from the held-out part, and what is made up has seeds of
its own.
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer of a chat, in characters.
_ANSWER = 1200
# Annexes of a long document: some 8,000 tokens.
_ANNEXES = 16

Turns = list[tuple[str, str]]


def documents_of(kind: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """Documents of one of KINDS, without end; turns go through the model's chat template where it has one."""
    rng = random.Random(f"{kind} {seed}")
    make = KINDS[kind](seed)
    for number in itertools.count():
        made = make(rng, number)
        yield made if isinstance(made, str) else _rendered(made, tokenizer, kind)


def _rendered(turns: Turns, tokenizer: PreTrainedTokenizerBase, kind: str) -> str:
    """A conversation as the model reads it, or as plain turns.

    Raises:
        AccullmError: the turns do not fit the template.
    """
    if tokenizer.chat_template is None:
        return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
    messages: list[Any] = [{"role": role, "content": text} for role, text in turns]
    return JsonLines(Path(f"other text {kind}"), "messages", [(1, (messages, None))]).render(0, tokenizer)


# -- chats -------------------------------------------------------------------------------------------------------

_OPENINGS = (
    "Hi! What can you tell me about {}?", "Please explain {}.", "I am reading about {} and do not get it. Help?",
    "Give me the details on {}.", "In a few paragraphs: {}.", "What should a beginner know about {}?",
)  # fmt: skip
_FOLLOWING = (
    "Thanks! And what about {}?", "Good. Now {}, please.", "That helps. How does {} compare?", "Next question: {}.",
    "Could you do the same for {}?", "I see. My colleague asks about {}.",
)  # fmt: skip
_LEADS = ("Sure.", "Of course.", "Gladly.", "Here is what matters.", "Good question.", "In short:")


def _chats(seed: int) -> Callable[[random.Random, int], Turns]:
    """Questions about held-out prose and made-up documents, and answers that give them."""
    prose = packaged_text.prose("held out", packaged_text.code("held out"))

    def make(rng: random.Random, number: int) -> Turns:
        turns: Turns = []
        for turn in range(rng.randint(2, 4)):
            if rng.random() < 0.6:
                document = rng.choice(prose)
                about, text = document.name.removeprefix("topic "), document.text
            else:
                text = generated_document(f"chat {seed} {number} {turn}")
                about = f'the document that begins with "{text.strip().splitlines()[0]}"'
            turns.append(("user", rng.choice(_FOLLOWING if turn else _OPENINGS).format(about)))
            turns.append(("assistant", f"{rng.choice(_LEADS)}\n\n{_shortened(text, rng)}"))
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


_TOOLS = (
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


def _tool_calls(seed: int) -> Callable[[random.Random, int], Turns]:
    """Declared tools, requests, calls as JSON, their results, and an answer that uses them."""

    def make(rng: random.Random, number: int) -> Turns:
        chosen = rng.sample(_TOOLS, rng.randint(2, 4))
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

_LETTERS = (
    (  # German
        "Sehr geehrte Frau {name}, vielen Dank für Ihre Bestellung Nr. {number} vom {date}.",
        "Leider verzögert sich die Lieferung nach {town} um einige Tage, weil ein Bauteil noch nicht eingetroffen ist.",
        "Wir bitten Sie, uns bis Ende der Woche mitzuteilen, ob Sie mit einer Teillieferung einverstanden sind.",
        "Der Betrag von {number} Euro wird erst fällig, wenn alle Geräte geprüft und übergeben worden sind.",
        "Sollten Sie Fragen haben, erreichen Sie unsere Werkstatt täglich zwischen acht und siebzehn Uhr.",
        "Nach der Übergabe erklärt Ihnen ein Techniker, wie die Anlage gewartet und im Winter abgeschaltet wird.",
    ),
    (  # French
        "Madame {name}, nous vous remercions de votre commande n° {number} du {date}.",
        "Malheureusement, la livraison à {town} aura quelques jours de retard, car une pièce n'est pas encore arrivée.",
        "Nous vous prions de nous dire avant la fin de la semaine si une livraison partielle vous convient.",
        "La somme de {number} euros ne sera due qu'une fois tous les appareils vérifiés et remis.",
        "Pour toute question, notre atelier vous répond chaque jour entre huit heures et dix-sept heures.",
        "Après la remise, un technicien vous montrera comment entretenir l'installation et l'arrêter en hiver.",
    ),
    (  # Spanish
        "Estimada señora {name}: le agradecemos su pedido n.º {number} del {date}.",
        "Por desgracia, la entrega en {town} se retrasará unos días porque todavía no ha llegado una pieza.",
        "Le rogamos que nos comunique antes del fin de semana si acepta una entrega parcial.",
        "El importe de {number} euros no vence hasta que todos los aparatos hayan sido revisados y entregados.",
        "Si tiene alguna pregunta, nuestro taller atiende todos los días de ocho a diecisiete horas.",
        "Después de la entrega, un técnico le explicará cómo mantener la instalación y apagarla en invierno.",
    ),
    (  # Italian
        "Gentile signora {name}, La ringraziamo per l'ordine n. {number} del {date}.",
        "Purtroppo la consegna a {town} ritarderà di alcuni giorni, perché un pezzo non è ancora arrivato.",
        "La preghiamo di comunicarci entro la fine della settimana se accetta una consegna parziale.",
        "L'importo di {number} euro sarà dovuto solo quando tutti gli apparecchi saranno stati controllati.",
        "Per qualsiasi domanda la nostra officina risponde ogni giorno dalle otto alle diciassette.",
        "Dopo la consegna un tecnico Le spiegherà come curare l'impianto e come spegnerlo d'inverno.",
    ),
    (  # Portuguese
        "Prezada senhora {name}, agradecemos a sua encomenda n.º {number} de {date}.",
        "Infelizmente, a entrega em {town} vai atrasar alguns dias, porque uma peça ainda não chegou.",
        "Pedimos que nos diga até ao fim da semana se aceita uma entrega parcial.",
        "O valor de {number} euros só será devido quando todos os aparelhos tiverem sido verificados e entregues.",
        "Se tiver perguntas, a nossa oficina atende todos os dias entre as oito e as dezassete horas.",
        "Depois da entrega, um técnico vai explicar como cuidar da instalação e como desligá-la no inverno.",
    ),
    (  # Dutch
        "Geachte mevrouw {name}, hartelijk dank voor uw bestelling nr. {number} van {date}.",
        "Helaas komt de levering in {town} enkele dagen later, omdat een onderdeel nog niet is aangekomen.",
        "Wij verzoeken u ons voor het einde van de week te laten weten of een deellevering goed is.",
        "Het bedrag van {number} euro hoeft pas betaald te worden als alle toestellen zijn nagekeken.",
        "Voor vragen is onze werkplaats elke dag tussen acht en zeventien uur bereikbaar.",
        "Na de overdracht legt een monteur uit hoe u de installatie onderhoudt en in de winter uitschakelt.",
    ),
    (  # Polish
        "Szanowna Pani {name}, dziękujemy za zamówienie nr {number} z dnia {date}.",
        "Niestety dostawa do miasta {town} opóźni się o kilka dni, ponieważ jedna część jeszcze nie dotarła.",
        "Prosimy o informację do końca tygodnia, czy zgadza się Pani na dostawę częściową.",
        "Kwota {number} euro będzie należna dopiero po sprawdzeniu i przekazaniu wszystkich urządzeń.",
        "W razie pytań nasz warsztat jest dostępny codziennie od ósmej do siedemnastej.",
        "Po odbiorze technik wyjaśni, jak dbać o instalację i jak wyłączyć ją na zimę.",
    ),
    (  # Russian
        "Уважаемая госпожа {name}, благодарим вас за заказ № {number} от {date}.",
        "К сожалению, доставка в город {town} задержится на несколько дней, так как одна деталь ещё не пришла.",
        "Просим сообщить нам до конца недели, согласны ли вы на частичную поставку.",
        "Сумму в {number} евро нужно заплатить только после проверки и передачи всех приборов.",
        "Если у вас есть вопросы, наша мастерская отвечает ежедневно с восьми до семнадцати часов.",
        "После передачи техник объяснит, как ухаживать за установкой и как отключать её зимой.",
    ),
    (  # Chinese
        "尊敬的{name}女士,感谢您于{date}提交的第{number}号订单。",
        "很遗憾,由于一个零件尚未到货,发往{town}的货物将推迟几天。",
        "请您在本周末之前告诉我们是否同意分批交货。",
        "{number}欧元的款项在所有设备检验并交付之后才需要支付。",
        "如果您有任何问题,我们的车间每天八点到十七点都可以联系。",
        "交付之后,技术人员会说明如何保养设备,以及冬天怎样关闭它。",
    ),
    (  # Japanese
        "{name}様、{date}のご注文(番号{number})をありがとうございます。",
        "申し訳ございませんが、部品がまだ届いていないため、{town}への配達は数日遅れます。",
        "分割での納品でよろしいかどうか、今週末までにお知らせください。",
        "{number}ユーロのお支払いは、すべての機器の検査と引き渡しが終わってからで結構です。",
        "ご質問がございましたら、工場は毎日八時から十七時まで受け付けております。",
        "引き渡しの後、技術者が設備の手入れの方法と冬に止める方法をご説明します。",
    ),
)


def _letters(seed: int) -> Callable[[random.Random, int], str]:
    """Business letters in ten languages by turns."""

    def make(rng: random.Random, number: int) -> str:
        first, *others = _LETTERS[number % len(_LETTERS)]
        sentences = [first, *rng.sample(others, rng.randint(3, len(others)))]
        facts = ({"name": rng.choice(_NAMES), "town": rng.choice(_TOWNS), "date": _date(rng),
                  "number": rng.randint(100, 99999)} for _ in sentences)  # fmt: skip
        return "\n".join(sentence.format(**of_it) for sentence, of_it in zip(sentences, facts, strict=True))

    return make


# -- long documents ----------------------------------------------------------------------------------------------


def _long_documents(seed: int) -> Callable[[random.Random, int], str]:
    """Agreements, tables and schemas as the annexes of one document, which refer back to one another."""

    def make(rng: random.Random, number: int) -> str:
        parts = []
        for annex in range(1, _ANNEXES + 1):
            text = generated_document(f"documents {seed} {number} {annex}").strip()
            back = f"\n\nThis annex is read together with Annex {rng.randrange(1, annex)}." if annex > 1 else ""
            parts.append(f"Annex {annex}\n\n{text}{back}")
        return "\n\n".join(parts)

    return make


KINDS: Mapping[str, Callable[[int], Callable[[random.Random, int], str | Turns]]] = {
    "chat": _chats,
    "tools": _tool_calls,
    "languages": _letters,
    "documents": _long_documents,
}
