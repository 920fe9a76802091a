"""The documents of the bundled tasks: made when they are asked for, from the language reference inside every Python.

They are text, the same for every model; no tokenizer has a say. A prompt is a document's `context` and `question`, and
nothing in the question is needed to find the context's end: a press compresses the context, the question comes after.
The beginning of a list of documents is spread over the book and over depths as the whole list is, so that a `limit`
takes a fair sample; document number i is the same in a short list and in a long one.
"""

import random
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NoReturn

from datasets import Dataset

from kvneox_lib.inputs.passkeys import SENTENCE_END, WORD_END, Passkey, make_passkeys
from kvneox_lib.inputs.text import load_text
from kvneox_lib.neox.checks import check_int

N_DOCUMENTS = 240
CONTEXT_CHARACTERS = 3600  # some 1,000 tokens
LEAST_CHARACTERS = 600  # in less there is no room for four statements at depths that differ
N_DEPTHS = 12
SHORTEST = 0.9  # of the context's characters, where it must begin with a sentence and end at a given place
NEAR = 0.05  # of a context: how far from its depth something may stand
GOLDEN = (5**0.5 - 1) / 2  # its multiples, each without its whole part, are spread evenly, however many are taken
STATEMENTS = 4  # in a context of passkeys
ASKED_AT_ONCE = 3
CHOICES = 4
QUESTION_WORDS = 10  # of a cloze
PUNCTUATION = "\"'“”‘’()[]{}<>*`|.,;:!?—"
# The beginning of a sentence, 8 to 16 words; the three words after it stand on the same line.
BEGINNING = re.compile(r"(?:\S+\s+){7,15}\S+(?=(?: \S+){3}\s)")
CONTINUATION = re.compile(r"(?: \S+){3}")


@dataclass(frozen=True)
class Document:
    context: str  # what a press compresses
    question: str  # what is read after it
    answer: str
    choices: list[str]  # of an open question the answer alone
    label: int  # choices[label] == answer
    depth: float  # where in the context that stands which the question is about, 0 its beginning and 1 its end
    book: str  # what the context is taken from; it differs a little from one Python to the next


@dataclass(frozen=True, eq=False)  # there is one, and it is cheap to look up
class Book:
    name: str
    text: str
    sentences: list[int]  # where they begin


@dataclass(frozen=True)
class Passage:
    number: int
    text: str
    depth: float  # where in it that should stand which will be asked about
    rng: random.Random


def passkey(
    n_documents: int = N_DOCUMENTS, context_characters: int = CONTEXT_CHARACTERS, seed: int = 0, **metadata
) -> dict[str, Dataset]:
    """Four passkeys are stated in the context, one is asked for."""
    documents = []
    for passage in _passages(n_documents, context_characters, seed):
        keys = make_passkeys(passage.rng, STATEMENTS, read_book().text)
        context = _with_statements(passage, keys)
        asked, depth = keys[0], _depth_of(keys[0], context)
        documents.append(_open_document(context, asked.question, asked.digits, depth))
    return _as_test_split(documents)


def multikey(
    n_documents: int = N_DOCUMENTS, context_characters: int = CONTEXT_CHARACTERS, seed: int = 0, **metadata
) -> dict[str, Dataset]:
    """Four passkeys are stated in the context, three are asked for, one after another. Each wrong choice swaps the
    digits of two of the three, so all choices hold the same words and digits, and who knows only one of the passkeys
    cannot tell two of the choices apart."""
    documents = []
    for passage in _passages(n_documents, context_characters, seed):
        keys = make_passkeys(passage.rng, STATEMENTS, read_book().text)
        context = _with_statements(passage, keys)
        one, two, three = asked = keys[:ASKED_AT_ONCE]
        wrong = [_answers(asked, told) for told in ([two, one, three], [three, two, one], [one, three, two])]
        passage.rng.shuffle(wrong)
        right, depth = _answers(asked, asked), _depth_of(one, context)
        documents.append(_choice(passage.number, context, one.question, right, wrong, depth))
    return _as_test_split(documents)


def cloze(
    n_documents: int = N_DOCUMENTS, context_characters: int = CONTEXT_CHARACTERS, seed: int = 0, **metadata
) -> dict[str, Dataset]:
    """The last word of a passage, to be guessed from the ten before it and from the context, where the same word has
    stood once, after the same word as here. The wrong choices stand in the context too; they are those that follow
    that word most often in the rest of the book, but never in the context.
    Without the context nothing but habit tells them apart."""
    _check(n_documents, context_characters, seed)
    text, documents = read_book().text, []
    for number, blank in enumerate(_blanks_in_turn(n_documents, context_characters, seed)):
        context, question = text[blank.start : blank.asked], text[blank.asked : blank.end]
        documents.append(_choice(number, context, question, blank.word, blank.others, blank.depth))
    return _as_test_split(documents)


def copy(
    n_documents: int = N_DOCUMENTS, context_characters: int = CONTEXT_CHARACTERS, seed: int = 0, **metadata
) -> dict[str, Dataset]:
    """A sentence of the context begins again; the answer is its next three words."""
    documents = []
    for passage in _passages(n_documents, context_characters, seed, _beginning_near):
        beginning = _beginning_near(passage)
        answer = CONTINUATION.match(passage.text, beginning.end())[0].strip()
        depth = beginning.start() / len(passage.text)
        documents.append(_open_document(passage.text, f"\n\n{beginning[0]}", answer, depth))
    return _as_test_split(documents)


# ---- the book -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def read_book() -> Book:
    text = load_text("python-docs")
    book = text.documents[0]
    return Book(text.name, book, _sentences(book))


def _sentences(text: str) -> list[int]:
    """Where sentences begin."""
    return [0, *(match.end() for match in re.finditer(rf"{SENTENCE_END}\s+(?=[\"'*]*[A-Z])", text))]


def _passages(
    n_documents: int, context_characters: int, seed: int, can_be_asked: Callable[[Passage], Any] = bool
) -> Iterator[Passage]:
    """Stretches of the book that begin with a sentence and end with a word, of which no two are the same: the book
    repeats itself here and there."""
    _check(n_documents, context_characters, seed)
    book = read_book()
    left = [start for start in book.sentences if start <= len(book.text) - context_characters]
    texts = set()
    for number in range(n_documents):
        target = int(_place(number, seed) * (len(book.text) - context_characters))
        rng, first = random.Random(f"{seed} {number}"), bisect_left(left, target)
        for start in [*left[first:], *left[:first]]:
            text = _up_to(book.text[start : start + context_characters + 1], context_characters)
            passage = Passage(number, text, _depth(number), rng)
            if text not in texts and can_be_asked(passage):
                break
        else:
            _refuse(n_documents, number, context_characters)
        left.remove(start)
        texts.add(text)
        yield passage


def _place(number: int, seed: int) -> float:
    """Where in the book, from 0 to 1."""
    return (random.Random(seed).random() + number * GOLDEN) % 1


def _depth(number: int) -> float:
    """Each of the depths in turn, in strides of 5, so that near ones do not follow each other."""
    return (5 * number % N_DEPTHS + 0.5) / N_DEPTHS


def _up_to(text: str, n: int) -> str:
    """The beginning of the text, at most `n` characters, to the end of a word."""
    return text[: max(match.end() for match in re.finditer(WORD_END, text[: n + 1]))]


def _check(n_documents: int, context_characters: int, seed: int) -> None:
    check_int("n_documents", n_documents, 1)
    check_int("context_characters", context_characters, LEAST_CHARACTERS)
    check_int("seed", seed, 0)
    if context_characters > (size := len(read_book().text)):
        raise ValueError(f"context_characters={context_characters}: the book has {size}, so at most that is allowed")


def _refuse(n_documents: int, most: int, context_characters: int) -> NoReturn:
    raise ValueError(
        f"n_documents={n_documents}: with context_characters={context_characters} the book has places for {most}; "
        "ask for at most that many"
    )


# ---- passkeys -------------------------------------------------------------------------------------------------------


def _with_statements(passage: Passage, keys: Sequence[Passkey]) -> str:
    """The first key at the passage's depth, the others a quarter of the context further each, at its end from the
    beginning again."""
    statements = ["".join(key.statement) for key in keys]
    text = _up_to(passage.text, len(passage.text) - sum(map(len, statements)))
    depths = [(passage.depth + i / len(keys)) % 1 for i in range(len(keys))]
    for depth, statement in sorted(zip(depths, statements), reverse=True):  # what is put in moves only what comes after
        gap = _gap_near(text, depth)
        text = text[:gap] + statement + text[gap:]
    return text


def _gap_near(text: str, depth: float) -> int:
    """Where a sentence has ended; where none ends near, a word."""
    target = depth * len(text)
    for pattern in (SENTENCE_END, WORD_END):
        gap = min((match.end() for match in re.finditer(pattern, text)), key=lambda end: abs(end - target), default=0)
        if gap and abs(gap - target) <= NEAR * len(text):
            break
    return gap


def _depth_of(key: Passkey, context: str) -> float:
    return context.index("".join(key.statement)) / len(context)


def _answers(asked: Sequence[Passkey], told: Sequence[Passkey]) -> str:
    """What follows the first question: its answer, and the other questions with theirs; the digits are those `told`."""
    questions = ["", *(key.question for key in asked[1:])]
    return "".join(f"{question} {key.digits}." for question, key in zip(questions, told)).strip()


# ---- cloze ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """The book cut at white space; what stands at a number in one list stands there in the others."""

    pieces: list[re.Match]
    words: list[str]  # without punctuation, in small letters
    places: dict[str, list[int]]  # the numbers at which a word stands, ascending
    followers: dict[str, Counter]  # what stands after a word, and how often


@dataclass(frozen=True)
class Blank:
    """A word of the book to be guessed; what is read before it; and other words that could stand there."""

    word: str
    others: list[str]
    start: int  # of the context
    asked: int  # where the question begins
    end: int  # of the question, before the space that the word follows
    depth: float  # where in the context the word has stood before


def _blanks_in_turn(n_documents: int, context_characters: int, seed: int) -> Iterator[Blank]:
    """For each document one at its depth, nearest to its place in the book among those that are left."""
    found, contexts = [[] for _ in range(N_DEPTHS)], set()
    for blank in _blanks(read_book(), context_characters):
        found[int(blank.depth * N_DEPTHS)].append(blank)
    for number in range(n_documents):
        left, target = found[int(_depth(number) * N_DEPTHS)], _place(number, seed) * len(read_book().text)
        left.sort(key=lambda blank: abs(blank.start - target), reverse=True)
        while left and read_book().text[left[-1].start : left[-1].asked] in contexts:
            left.pop()  # the book repeats itself here and there
        if not left:
            _refuse(n_documents, number, context_characters)
        contexts.add(read_book().text[left[-1].start : left[-1].asked])
        yield left.pop()


def _blanks(book: Book, context_characters: int) -> Iterator[Blank]:
    words = _read_words(book)
    for i in range(QUESTION_WORDS + 1, len(words.words)):
        asked = words.pieces[i - QUESTION_WORDS - 1].end()
        start = book.sentences[bisect_left(book.sentences, asked - context_characters)]
        whole = asked >= context_characters and asked - start >= SHORTEST * context_characters
        if whole and _is_plain(book.text, words.pieces[i]) and (blank := _blank(words, i, start, asked)):
            yield blank


@lru_cache(maxsize=1)
def _read_words(book: Book) -> Words:
    pieces = list(re.finditer(r"\S+", book.text))
    words = [piece[0].strip(PUNCTUATION).lower() for piece in pieces]
    places, followers = defaultdict(list), defaultdict(Counter)
    for i, word in enumerate(words):
        places[word].append(i)
    for word, piece, following in zip(words, pieces[1:], words[1:]):
        followers[word][following] += bool(_is_plain(book.text, piece))
    return Words(pieces, words, places, followers)


def _blank(words: Words, i: int, start: int, asked: int) -> Blank | None:
    """Word number i, if it has stood in the context once, after the same word as here, and does not stand in the
    question; and if there are other words that could follow."""
    first = bisect_left(words.pieces, start, key=re.Match.start)
    after = i - QUESTION_WORDS  # the first word of the question
    word, before = words.words[i], words.words[i - 1]
    stood = _between(words.places[word], first, i)
    if len(stood) != 1 or not first < stood[0] < after or words.words[stood[0] - 1] != before:
        return None
    followed = {words.words[j + 1] for j in _between(words.places[before], first, i)}
    read, question = set(words.words[first:after]), set(words.words[after:i])
    others = [
        other
        for other, n in words.followers[before].most_common()
        if n and other in read and other not in question and other not in followed
    ]
    if len(others) < CHOICES - 1:
        return None
    depth = (words.pieces[stood[0]].start() - start) / (asked - start)
    return Blank(word, others[: CHOICES - 1], start, asked, words.pieces[i].start() - 1, depth)


def _between(places: list[int], first: int, end: int) -> list[int]:
    return places[bisect_left(places, first) : bisect_left(places, end)]


def _is_plain(text: str, piece: re.Match) -> bool:
    """A word in small letters, four at least, after one space and another word."""
    return bool(
        re.fullmatch(r"[a-z]{4,}[.,;:]?", piece[0]) and re.fullmatch(r"\w ", text[piece.start() - 2 : piece.start()])
    )


# ---- copy -----------------------------------------------------------------------------------------------------------


def _is_prose(text: str) -> bool:
    """One paragraph; no heading, table, grammar or program."""
    return not re.search(r"\n\s*\n|[*=~^-]{3}|[|>]|:=", text)


def _beginning_near(passage: Passage) -> re.Match | None:
    """A sentence that stands at about the passage's depth and can be asked for."""
    text, target = passage.text, passage.depth * len(passage.text)
    for start in sorted(_sentences(text), key=lambda start: abs(start - target)):
        beginning = BEGINNING.match(text, start)
        if abs(start - target) > NEAR * len(text):
            return None
        if beginning and text.count(beginning[0]) == 1 and _is_prose(beginning[0]):
            return beginning
    return None


# ---- datasets -------------------------------------------------------------------------------------------------------


def _open_document(context: str, question: str, answer: str, depth: float) -> Document:
    return Document(context, question, answer, [answer], 0, depth, read_book().name)


def _choice(number: int, context: str, question: str, answer: str, wrong: Sequence[str], depth: float) -> Document:
    """The right choice is each in turn, and another one when its depth comes round again."""
    label = (number + number // N_DEPTHS) % CHOICES
    choices = [*wrong[:label], answer, *wrong[label:]]
    return Document(context, question, answer, choices, label, depth, read_book().name)


def _as_test_split(documents: Sequence[Document]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list([asdict(document) for document in documents])}
