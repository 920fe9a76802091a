"""Whether a fact in the context survives compression: passkeys hidden in filler, and questions about them.

The question comes after compression (what counts for a cache that is used again), or stands inside the compressed
context, all but its last token. Either way every digit is predicted by a query that read the compressed cache; none is
left over from the prefill.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache

from kvneox_lib.inputs.passkeys import RecallKey, RecallSample, recall_samples
from kvneox_lib.inputs.templates import Template
from kvneox_lib.measures.perplexity import read_on
from kvneox_lib.measures.prefill import bits_of_each, first_position, prefill, store
from kvneox_lib.measures.survivors import kept_counts, prefill_and_find
from kvneox_lib.neox.hooks import in_turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, adapt, with_model
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.facts import decoding_part


@dataclass(frozen=True)
class RecallRow:
    """One key, asked for once."""

    name: str
    depth: float  # where it is in the context, from 0 to 1
    correct: bool  # all digits, each the model's first choice
    nll: float  # mean over the tokens of the answer
    digits_kept: float | None  # share of the digits' entries that survive, over layers and heads; None: not to be told
    statement_kept: float | None  # the same for the whole statement around them
    kept_fraction: float  # the same for the whole context
    kv_bytes: int
    digits_kept_by_head: torch.Tensor | None = field(repr=False, compare=False)  # (layers, heads)


@dataclass(frozen=True)
class RecallResult:
    rows: list[RecallRow]

    @property
    def accuracy(self) -> float:
        return sum(row.correct for row in self.rows) / len(self.rows)

    @property
    def nll(self) -> float:
        return sum(row.nll for row in self.rows) / len(self.rows)


def recall_accuracy(
    model,
    tokenizer,
    *,
    press=None,
    n_keys: int,
    context_length: int,
    filler: str,
    query_aware: bool = False,
    seed: int = 0,
    keys_per_context: int = 4,
    depths: Sequence[float] | None = None,
    kv_bits: int | None = None,
    template: str | Template = "passkey",
    n_distractors: int = 0,
) -> RecallResult:
    """Exact recall of `n_keys` passkeys, a few to each context of `context_length` tokens of `filler`.

    query_aware: let the press see the question, but for its last token. `depths`, `template` (the wording: a name or
    your own) and `n_distractors` (numbers in each context that nobody asks for): see `recall_samples`. kv_bits: 8, 4 or
    2 for each number that is left of the context.
    """
    samples = recall_samples(
        tokenizer,
        filler=filler,
        n_keys=n_keys,
        keys_per_context=keys_per_context,
        context_length=context_length,
        depths=depths,
        seed=seed,
        template=template,
        n_distractors=n_distractors,
    )
    rows = [rows[0] for sample in samples for rows in ask_each(model, sample, [press], query_aware, [kv_bits])]
    return RecallResult(rows)


@torch.no_grad()
def ask_each(
    model, sample: RecallSample, presses: list, query_aware: bool = False, kv_bits: list[int | None] | None = None
) -> Iterator[list[RecallRow]]:
    """For each key of the sample, a row for each press, in the bits that are given for each."""
    kv_bits = bits_of_each(kv_bits, presses)
    model = adapt(model)
    device = model.model.embed_tokens.weight.device
    for context, keys, n_fed in _contexts(sample, query_aware):
        found = prefill_and_find(model, context[None].to(device), presses)
        for key in keys:
            read = torch.cat([key.question_ids[n_fed:], key.answer_ids])[None].to(device)
            yield [
                _ask(model, copy.deepcopy(cache), len(context), read, key, press, bits, kept)
                for press, bits, (cache, kept) in zip(presses, kv_bits, found)
            ]


def _contexts(sample: RecallSample, query_aware: bool) -> Iterator[tuple[torch.Tensor, list[RecallKey], int]]:
    """What to compress, the keys to ask for then, and how much of a question is in there already."""
    if not query_aware:
        yield sample.context_ids, sample.keys, 0
        return
    for key in sample.keys:
        yield torch.cat([sample.context_ids, key.question_ids[:-1]]), [key], len(key.question_ids) - 1


def first_context(sample: RecallSample, query_aware: bool) -> torch.Tensor:
    """(1, T): the first that a press is given of this sample."""
    return next(_contexts(sample, query_aware))[0][None]


@in_turn
def _ask(model: KVNeoXForCausalLM, cache: Cache, n_context: int, read: torch.Tensor, key: RecallKey, press, bits, kept):
    kept_fraction = float(kept_counts(cache).float().mean()) / n_context
    if decoding_part(press) is not None:
        press = copy.deepcopy(press)  # its counters are of one question
    store(cache, press, bits)
    kv_bytes = cache.kv_bytes
    nll, hit = read_on(model, cache, read, first_position(cache, n_context, press), press)
    answer = slice(-len(key.answer_ids), None)
    digits_kept = statement_kept = by_head = None
    if press is not None and kept is not None:
        positions = kept[:, 0].float()  # (layers, heads, T)
        by_head = positions[..., slice(*key.digits_span)].mean(-1)
        digits_kept, statement_kept = float(by_head.mean()), float(positions[..., slice(*key.span)].mean())
    return RecallRow(
        name=key.name,
        depth=key.depth,
        correct=bool(hit[0, answer].all()),
        nll=float(nll[0, answer].mean()),
        digits_kept=digits_kept,
        statement_kept=statement_kept,
        kept_fraction=kept_fraction,
        kv_bytes=kv_bytes,
        digits_kept_by_head=by_head,
    )


@torch.no_grad()
@with_model
def copy_attention(model, samples: Sequence[RecallSample]) -> torch.Tensor:
    """(layers, heads): how much each head of the uncompressed model looks at a digit when it has to say that digit.

    Recall hangs on few heads. A press that keeps the digits there can drop them everywhere else.
    """
    device, seen = model.model.embed_tokens.weight.device, []
    with attention(model, "eager"):
        for sample in samples:
            cache = prefill(model, sample.context_ids[None].to(device), None)
            for key in sample.keys:
                read, n = torch.cat([key.question_ids, key.answer_ids[:-1]]), len(key.answer_ids)
                weights = model.model(
                    input_ids=read[None].to(device), past_key_values=copy.deepcopy(cache), output_attentions=True
                ).attentions  # of each layer, (1, heads, queries, keys)
                digits = torch.arange(*key.digits_span)
                seen.append(torch.stack([of_layer[0, :, range(-n, 0), digits].mean(-1).cpu() for of_layer in weights]))
    return torch.stack(seen).float().mean(0)
