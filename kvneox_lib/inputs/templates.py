"""Sentences in which a number is told, and the question for it: what recall is asked with, and what the bundled model
was trained on. Some wordings were kept from it, so that what it recalls can be told from what it has by heart.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """`statement` has {name} and, after a space, {digits}; `question` ends where the digits and that space come."""

    statement: str
    question: str
    trained: bool  # whether the bundled model has seen it; other models have seen none of them on purpose

    def told(self, name: str, digits: str) -> tuple[str, str, str]:
        """Before the digits, these with the space before them, and after them."""
        before, after = self.statement.split(" {digits}")
        return before.format(name=name), f" {digits}", after.format(name=name)

    def asked(self, name: str) -> str:
        return self.question.format(name=name)


TEMPLATES = {
    "passkey": Template(
        " The passkey of {name} is {digits}. Remember it.",
        "\n\nWhat is the passkey of {name}? The passkey of {name} is",
        trained=True,
    ),
    "account": Template(
        " The account number of {name} is {digits}.",
        "\n\nWhat is the account number of {name}? The account number of {name} is",
        trained=True,
    ),
    "ticket": Template(
        " {name} holds ticket {digits}, as you know.",
        "\n\nWhich ticket does {name} hold? {name} holds ticket",
        trained=True,
    ),
    "parcel": Template(
        " Parcel {digits} is to be sent to {name}.",
        "\n\nWhich parcel is to be sent to {name}? It is parcel",
        trained=True,
    ),
    "price": Template(
        " They paid {digits} crowns for the {name} farm.",
        "\n\nWhat did they pay for the {name} farm? They paid",
        trained=True,
    ),
    "register": Template(
        " In the register {name} has the entry {digits}, and no other.",
        "\n\nWhich entry does {name} have in the register? The entry of {name} is",
        trained=True,
    ),
    "telephone": Template(  # a frame that was trained with many nouns, and not with this one
        " The telephone of {name} is {digits}. Remember it.",
        "\n\nWhat is the telephone of {name}? The telephone of {name} is",
        trained=False,
    ),
    "house": Template(  # a frame that was not trained, the name first
        " {name} lives in house {digits} now.",
        "\n\nWhere does {name} live? {name} lives in house",
        trained=False,
    ),
    "order": Template(  # the digits first
        " Order {digits} was given to {name} that day.",
        "\n\nWhat was given to {name}? It was order",
        trained=False,
    ),
}

# What else the bundled model was trained on in the words of the first two
NOUNS = (
    *("locker", "badge", "seat", "bank card", "library card", "membership", "licence", "policy", "invoice", "bicycle"),
    *("wagon", "stall", "cabin", "letter box", "contract", "prize", "grave", "painting", "receipt", "voucher"),
)


def trained_wordings() -> list[Template]:
    frames = {"passkey": TEMPLATES["passkey"], "account number": TEMPLATES["account"]}
    others = [
        Template(frame.statement.replace(named, noun), frame.question.replace(named, noun), trained=True)
        for named, frame in frames.items()
        for noun in NOUNS
    ]
    return [template for template in TEMPLATES.values() if template.trained] + others
