"""Retrieval text, the probe that perplexity is not: passkeys hidden in filler, and the questions about them."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch

from kvneox_lib.inputs.templates import TEMPLATES, Template, find_template
from kvneox_lib.inputs.windows import Tokens, byte_offsets, part_at, tokenize
from kvneox_lib.neox.checks import check_int

# After what a sentence has ended, and after what a word has.
SENTENCE_END, WORD_END = r"[.!?][\"'”’)\]]*(?=\s)", r"\S(?=\s)"


@dataclass(frozen=True)
class Passkey:
    """A made-up name and its digits, and the words in which these are told and asked for."""

    name: str
    digits: str
    template: Template = TEMPLATES["passkey"]

    @property
    def statement(self) -> tuple[str, str, str]:  # before the digits, these, and after them
        return self.template.told(self.name, self.digits)

    @property
    def question(self) -> str:
        return self.template.asked(self.name)


@dataclass(frozen=True)
class RecallKey:
    name: str
    digits: str
    question_ids: torch.Tensor  # (n,)
    answer_ids: torch.Tensor  # (n,) the digits with the space before them
    depth: float  # as asked or drawn; the statement is at the nearest gap, see `span`
    span: tuple[int, int]  # tokens of the context that are the statement
    digits_span: tuple[int, int]  # those of them that are the digits: context_ids[slice(*digits_span)] == answer_ids


@dataclass(frozen=True)
class RecallSample:
    context_ids: torch.Tensor  # (context_length,)
    keys: list[RecallKey]
    distractors: list[RecallKey] = field(default_factory=list)  # which stand there too, and which nobody asks for


def recall_samples(
    tokenizer,
    *,
    filler: str,
    n_keys: int,
    keys_per_context: int,
    context_length: int,
    depths: Sequence[float] | None = None,
    seed: int = 0,
    template: str | Template = "passkey",
    n_distractors: int = 0,
) -> list[RecallSample]:
    """Contexts of exactly `context_length` tokens of `filler` in which passkeys are stated, `n_keys` in all.

    Key number i is at depths[i % len(depths)], 0 the start of the context and 1 its end, or at a random depth each. A
    statement stands between two sentences of the filler (between two words where no sentence ends near), contexts are
    spread evenly over the filler and begin with a sentence. Filler and statements are tokenized apart and their ids
    concatenated, so every span is exact; they meet where a word begins, so the text as a whole has the same tokens. Of
    a large filler only those `parts` are tokenized in which a context lies.

    template: the wording, one of TEMPLATES by name, or your own. n_distractors: in each context, so many numbers more
    that nobody asks for, at random places: names and digits that no key there has, told in the other wordings of
    TEMPLATES, each drawn anew. Neither changes the names, digits and depths of the keys, so that runs which differ in
    them can be compared key by key.
    """
    check_int("n_keys", n_keys, 1)
    check_int("keys_per_context", keys_per_context, 1)
    check_int("context_length", context_length, 1)
    check_int("n_distractors", n_distractors, 0)
    template = find_template(template)
    if depths is not None and (not len(depths) or not all(0 <= depth <= 1 for depth in depths)):
        raise ValueError(f"depths={depths!r}: must be numbers from 0 to 1, at least one")
    rng, others = random.Random(seed), random.Random(f"distractors of {seed}")
    read = lru_cache(maxsize=1)(partial(_with_gaps, tokenizer=tokenizer))
    n_samples, jitter = -(-n_keys // keys_per_context), rng.random()
    samples = []
    for i in range(n_samples):
        numbers = range(i * keys_per_context, min((i + 1) * keys_per_context, n_keys))
        wanted = [rng.random() if depths is None else float(depths[k % len(depths)]) for k in numbers]
        passkeys = make_passkeys(rng, len(wanted), filler, template)
        keys = _make_keys(tokenizer, passkeys, wanted)
        distractors = _make_distractors(tokenizer, others, filler, passkeys, n_distractors)
        part, place = part_at(filler, (i + jitter) / n_samples)
        text, gaps = read(part)
        n_filler = context_length - sum(len(statement) for _, statement in keys + distractors)
        if n_filler < 1 or n_filler > len(text.ids):
            raise ValueError(
                f"context_length={context_length}: {len(keys + distractors)} statements have "
                f"{context_length - n_filler} tokens and leave {n_filler} for the filler, which has {len(text.ids)}; "
                f"between 1 and that is allowed (keys_per_context={keys_per_context}, n_distractors={n_distractors})"
            )
        start = _last_at_most(gaps[0], place * (len(text.ids) - n_filler))
        context_ids, placed = _assemble(
            text.ids[start : start + n_filler], [g - start for g in gaps], keys + distractors
        )
        told = {key.name for key, _ in distractors}
        asked = [key for key in placed if key.name not in told]
        samples.append(RecallSample(context_ids, asked, [key for key in placed if key.name in told]))
    return samples


def make_passkeys(
    rng: random.Random,
    n: int,
    filler: str,
    template: Template = TEMPLATES["passkey"],
    besides: Sequence[Passkey] = (),
) -> list[Passkey]:
    """No two have a name or their digits in common, nor with those `besides` them, and no name stands in the filler,
    not even within a word."""
    taken, names = {word for passkey in besides for word in (passkey.name, passkey.digits)}, []
    numbers = map(str, rng.sample(range(10_000, 100_000), n + len(besides)))
    numbers = [number for number in numbers if number not in taken][:n]
    while len(names) < n:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
        name = ("".join(syllables) + rng.choice(("", "l", "n", "r", "s"))).capitalize()
        if name not in names and name not in taken and name not in filler:
            names.append(name)
    return [Passkey(name, number, template) for name, number in zip(names, numbers)]


def _make_distractors(
    tokenizer, rng: random.Random, filler: str, besides: list[Passkey], n: int
) -> list[tuple[RecallKey, list[int]]]:
    wordings = [other for other in TEMPLATES.values() if other != besides[0].template]
    drawn = make_passkeys(rng, n, filler, besides=besides)
    drawn = [replace(passkey, template=rng.choice(wordings)) for passkey in drawn]
    return _make_keys(tokenizer, drawn, [rng.random() for _ in drawn])


def _make_keys(tokenizer, passkeys: list[Passkey], depths: list[float]) -> list[tuple[RecallKey, list[int]]]:
    """Each with the ids of its statement; its spans are those in the statement, until it is placed."""
    keys = []
    for passkey, depth in zip(passkeys, depths):
        parts = [*passkey.statement, passkey.question]
        before, answer, after, question = tokenizer(parts, add_special_tokens=False).input_ids
        ids, digits_span = before + answer + after, (len(before), len(before) + len(answer))
        asked, answer = torch.tensor(question), torch.tensor(answer)
        keys.append((RecallKey(passkey.name, passkey.digits, asked, answer, depth, (0, len(ids)), digits_span), ids))
    return keys


def _with_gaps(filler: str, tokenizer) -> tuple[Tokens, list[np.ndarray]]:
    """Its tokens; the positions before which a sentence has ended, and those before which a word has; always with 0."""
    text = tokenize(filler, tokenizer)
    ends = np.cumsum(text.n_bytes)
    normalizer = tokenizer.backend_tokenizer.normalizer
    filler = normalizer.normalize_str(filler) if normalizer else filler
    found = []
    for pattern in (SENTENCE_END, WORD_END):
        places = byte_offsets(filler, [match.end() for match in re.finditer(pattern, filler)])
        found.append(np.concatenate(([0], 1 + np.flatnonzero(np.isin(ends, places)))))
    return text, found


def _last_at_most(gaps: np.ndarray, limit: float) -> int:
    return int(gaps[np.searchsorted(gaps, limit, side="right") - 1])


def _assemble(
    filler: np.ndarray, gaps: list[np.ndarray], keys: list[tuple[RecallKey, list[int]]]
) -> tuple[torch.Tensor, list[RecallKey]]:
    """The context, and the keys where they stand in it."""
    sentences, words = ([*g[(g >= 0) & (g <= len(filler))]] for g in gaps)

    def place(key: RecallKey) -> int:
        target = key.depth * len(filler)
        best = min(sentences, key=lambda gap: abs(gap - target))
        return best if abs(best - target) <= 0.05 * len(filler) else min(words, key=lambda gap: abs(gap - target))

    ids, placed, done = [], [], 0
    for at, key, statement in sorted(((place(k), k, s) for k, s in keys), key=lambda row: (row[0], row[1].depth)):
        ids += filler[done:at].tolist()
        shift, done = len(ids), at
        ids += statement
        spans = {f: tuple(shift + i for i in getattr(key, f)) for f in ("span", "digits_span")}
        placed.append(replace(key, **spans))
    return torch.tensor(ids + filler[done:].tolist()), placed
