"""Sentences in which a number is told, and the question for it: what recall is asked with, and what the models of ours
were trained on. Some wordings were kept from them, so that what they recall can be told from what they have by heart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvneox_lib.neox.checks import check_choice


@dataclass(frozen=True)
class Template:
    """`statement` begins with a space and has {name} and, after a space, {digits}; `question` ends where the digits
    and that space come, so that these are the same tokens in both."""

    statement: str
    question: str
    trained: tuple[str, ...] = ()  # models of ours that have seen it; others have seen none of them on purpose

    def __post_init__(self):
        named = re.sub(r" \{digits\}(?!\d)", "", self.statement, count=1)
        if not self.statement.startswith(" ") or not _only_names(named) or named == self.statement:
            raise ValueError(
                f"statement={self.statement!r}: must begin with a space and have {{name}} and, once and after a space, "
                "{digits}"
            )
        if not _only_names(self.question) or self.question != self.question.rstrip():
            raise ValueError(
                f"question={self.question!r}: must have {{name}} and end where a space and the digits come"
            )

    def told(self, name: str, digits: str) -> tuple[str, str, str]:
        """Before the digits, these with the space before them, and after them."""
        before, after = self.statement.split(" {digits}")
        return before.format(name=name), f" {digits}", after.format(name=name)

    def asked(self, name: str) -> str:
        return self.question.format(name=name)


def _only_names(text: str) -> bool:
    """Whether {name} is all that can be put in there."""
    return "{name}" in text and not re.search(r"[{}]", text.replace("{name}", ""))


DEMO, WORDINGS = "demo", "demo-wordings"  # the bundled model, and one by the other recipe of tools/train_demo.py

TEMPLATES = {
    "passkey": Template(
        " The passkey of {name} is {digits}. Remember it.",
        "\n\nWhat is the passkey of {name}? The passkey of {name} is",
        trained=(DEMO, WORDINGS),
    ),
    "account": Template(
        " The account number of {name} is {digits}.",
        "\n\nWhat is the account number of {name}? The account number of {name} is",
        trained=(WORDINGS,),
    ),
    "ticket": Template(
        " {name} holds ticket {digits}, as you know.",
        "\n\nWhich ticket does {name} hold? {name} holds ticket",
        trained=(WORDINGS,),
    ),
    "parcel": Template(
        " Parcel {digits} is to be sent to {name}.",
        "\n\nWhich parcel is to be sent to {name}? It is parcel",
        trained=(WORDINGS,),
    ),
    "price": Template(
        " They paid {digits} crowns for the {name} farm.",
        "\n\nWhat did they pay for the {name} farm? They paid",
        trained=(WORDINGS,),
    ),
    "register": Template(
        " In the register {name} has the entry {digits}, and no other.",
        "\n\nWhich entry does {name} have in the register? The entry of {name} is",
        trained=(WORDINGS,),
    ),
    "telephone": Template(  # a frame that was trained with many nouns, and not with this one
        " The telephone of {name} is {digits}. Remember it.",
        "\n\nWhat is the telephone of {name}? The telephone of {name} is",
    ),
    "house": Template(  # the name first
        " {name} lives in house {digits} now.",
        "\n\nWhere does {name} live? {name} lives in house",
    ),
    "order": Template(  # the digits first
        " Order {digits} was given to {name} that day.",
        "\n\nWhat was given to {name}? It was order",
    ),
}
ALL = "all"


def expand_templates(asked: str | Sequence[str]) -> list[str]:
    """The names of templates, each once: of one, of several, or of all."""
    names = list(asked) if isinstance(asked, list | tuple) else [asked]
    for name in names:
        check_choice("template", name, (ALL, *TEMPLATES))
    return list(dict.fromkeys(one for name in names for one in (TEMPLATES if name == ALL else [name])))


def find_template(asked: str | Template) -> Template:
    """A template by its name, or as it is."""
    if isinstance(asked, Template):
        return asked
    check_choice("template", asked, tuple(TEMPLATES))
    return TEMPLATES[asked]


# What the second was trained on besides, in the words of the first two
NOUNS = (
    *("locker", "badge", "seat", "bank card", "library card", "membership", "licence", "policy", "invoice", "bicycle"),
    *("wagon", "stall", "cabin", "letter box", "contract", "prize", "grave", "painting", "receipt", "voucher"),
)


def trained_wordings(model: str) -> list[Template]:
    """Those of the table that a model of ours was trained on."""
    return [template for template in TEMPLATES.values() if model in template.trained]


def with_other_nouns() -> list[Template]:
    frames = {"passkey": TEMPLATES["passkey"], "account number": TEMPLATES["account"]}
    return [
        Template(frame.statement.replace(named, noun), frame.question.replace(named, noun), frame.trained)
        for named, frame in frames.items()
        for noun in NOUNS
    ]
