"""Decoding from what a press left of a context."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvneox_lib.measures.chunks import check_reading
from kvneox_lib.measures.clock import Clock, PeakMemory
from kvneox_lib.measures.prefill import check_kv_bits, first_position, prefill_rows, store
from kvneox_lib.measures.rows import check_questions, readable_together, without_padding
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_ids, check_int, check_temperature
from kvneox_lib.neox.hooks import in_turn
from kvneox_lib.neox.kernels import linear_of_few_rows, make_ready, packed_weights
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, left_untouched, with_model
from kvneox_lib.presses.applying import applied
from kvneox_lib.presses.facts import decoding_part, rows_independent


@dataclass(frozen=True)
class Generation:
    tokens: torch.Tensor  # (batch, n new); a sample that has ended repeats its end-of-text token
    prefill_s: float  # to the first token
    decode_s: float  # for all others
    kv_bytes: int  # allocated when decoding ends
    kv_bytes_compressed: int  # of what is held when it begins, with questions if they are of unequal length
    kv_lengths: torch.Tensor  # (layers, batch, heads) entries held after compression
    peak_bytes: int | None  # of the decoding phase: the allocator's on CUDA, resident memory on Linux, else None
    prefill_peak_bytes: int | None = None  # of what came before
    logits: torch.Tensor | None = None  # (batch, n new, vocabulary), those that chose the tokens


@torch.no_grad()
@with_model
def generate(
    model,
    input_ids: torch.Tensor,
    *,
    press=None,
    question_ids: torch.Tensor | Sequence[torch.Tensor] | None = None,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    stop_at_eos: bool = True,
    temperature: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    with_logits: bool = False,
    stop_when: Callable[[torch.Tensor], torch.Tensor] | None = None,
    kv_bits: int | None = None,
    prefill_chunk: int | None = None,
    evict_while_reading: bool = False,
) -> Generation:
    """Compress `input_ids` (batch, T), then decode: greedily, or by drawing at a `temperature` above 0.

    Without `question_ids` the first token follows from the prefill, as in `with press(model): model.generate(...)`.
    With them, (batch, n) or a list with one (n_i,) for each row, they are read after compression, as in the kvpress
    pipeline. attention_mask (batch, T): prompts of unequal length are padded on the left, and each is read, compressed
    and continued as if it were alone. min_new_tokens: none of so many ends a sample. stop_when: told the new tokens
    (batch, n) after each step, it says which samples have ended, (batch,). kv_bits: 8, 4 or 2 for each number that the
    press leaves, see `CompactCache`; what is read later joins it, 64 tokens at a time, of questions of unequal length
    what is beyond the shortest at once. prefill_chunk: the context is read by so many tokens at a time, with the result
    of one pass; evict_while_reading: and after each chunk evicted from, which is another result; see `chunks`.
    """
    input_ids = check_ids("input_ids", input_ids, model)
    prompts = without_padding(input_ids, attention_mask)
    questions = check_questions(question_ids, model, prompts)
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("min_new_tokens", min_new_tokens, 0)
    check_temperature(temperature)
    lengths = [(len(prompt), len(question)) for prompt, question in zip(prompts, questions)]
    _check_batch(decoding_part(press), len(prompts), len(set(lengths)) == 1)
    check_kv_bits(kv_bits, press)
    reading = {"prefill_chunk": prefill_chunk, "evict_while_reading": evict_while_reading}
    for n_context in {len(prompt) for prompt in prompts}:
        check_reading(model, n_context, press, **reading)
    _warn_beyond_training(model, max(map(sum, lengths)), max_new_tokens)

    make_ready(model.dtype, kv_bits or 0)  # neither that nor packing is on the clock
    with packed_weights(model, len(prompts)), left_untouched(model):
        ends = Ends(model, len(prompts), min_new_tokens, stop_at_eos, stop_when)
        decoding = {"ends": ends, "max_new_tokens": max_new_tokens, "temperature": temperature}
        return _generate(model, prompts, questions, press, kv_bits, reading, decoding, with_logits)


def _generate(model, prompts, questions, press, kv_bits, reading, how, with_logits) -> Generation:
    peak, clock, decoding = PeakMemory(model.device), Clock(model.device), decoding_part(press)
    lengths = [(len(prompt), len(question)) for prompt, question in zip(prompts, questions)]
    equal, n_question = len(set(lengths)) == 1, max(n for _, n in lengths)
    headroom = n_question + how["max_new_tokens"]
    if decoding is not None:  # then it shrinks again, however long the text becomes
        headroom = min(headroom, _interval(decoding, headroom))
    question = None
    if equal:
        cache, hidden = prefill_rows(model, torch.stack(prompts), press, headroom, **reading)
        store(cache, press, kv_bits)
        position = torch.tensor([first_position(cache, len(prompts[0]), press)], device=model.device)
        kv_lengths, question = cache.kv_lengths, torch.stack(questions)
    else:
        cache, hidden, position = _read_unequal(model, prompts, questions, press, kv_bits, headroom, reading)
        kv_lengths = cache.kv_lengths - torch.tensor([n for _, n in lengths])[:, None]
    compressed, tokens, all_logits = cache.used_bytes, [], []
    for made, logits in _decode(model, cache, hidden, position, question, decoding, **how):
        tokens.append(made)
        if with_logits:
            all_logits.append(logits)
        if len(tokens) == 1:
            prefill_s, prefill_peak = clock.lap(), peak.lap()
            clock.lap()  # asking for the peak takes milliseconds
    return Generation(
        tokens=torch.stack(tokens, 1),
        prefill_s=prefill_s,
        decode_s=clock.lap(),
        kv_bytes=cache.kv_bytes,
        kv_bytes_compressed=compressed,
        kv_lengths=kv_lengths,
        peak_bytes=peak.lap(),
        prefill_peak_bytes=prefill_peak,
        logits=torch.stack(all_logits, 1) if with_logits else None,
    )


def _decode(
    model, cache, hidden, position, question, decoding, *, ends, max_new_tokens, temperature
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens (batch,) and the logits (batch, vocabulary) that chose them, step by step, after `hidden` (batch, d), or
    after a `question` (batch, n), read first."""
    with applied(decoding, model):
        if question is not None and question.shape[1]:
            hidden = _step(model, question, position, cache)
            position = position + question.shape[1]
        tokens = None
        for _ in range(max_new_tokens):
            if tokens is not None:
                hidden = _step(model, tokens[:, None], position, cache)
                position = position + 1
            logits = linear_of_few_rows(model.embed_out, hidden)
            tokens = ends.apply(choose(logits, ends, temperature))
            yield tokens, logits
            if ends.all_ended:
                return


@torch.no_grad()
@in_turn
def continue_rows(
    model: KVNeoXForCausalLM,
    caches: list[CompactCache],
    questions: list[torch.Tensor],
    press,
    positions: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_when: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """(batch, n new): what `generate` makes, from contexts that were read before, a cache (of one row) for each. Then
    a question (n_i,) for each is read, from its position on; all are decoded together."""
    decoding = decoding_part(press)
    _check_batch(decoding, len(caches), equal=len(caches) == 1)
    for cache, question in zip(caches, questions):
        cache.expect(len(question) + max_new_tokens)
    make_ready(model.dtype, caches[0].bits or 0)
    with packed_weights(model, len(caches)), left_untouched(model):
        starts = torch.tensor(positions, device=model.device)
        ends = Ends(model, len(caches), 0, True, stop_when)
        if len(caches) == 1:
            store(caches[0], press)
            cache, hidden, question = caches[0], None, questions[0][None]
        else:
            steps = [_step(model, q[None], at[None], cache) for q, at, cache in zip(questions, starts, caches)]
            cache, hidden, question = CompactCache.stack(caches), torch.cat(steps), None
            starts = starts + torch.tensor([len(q) for q in questions], device=starts.device)
        how = {"ends": ends, "max_new_tokens": max_new_tokens, "temperature": temperature}
        steps = _decode(model, cache, hidden, starts, question, decoding, **how)
        return torch.stack([tokens for tokens, _ in steps], 1)


def _check_batch(decoding, n_rows: int, equal: bool) -> None:
    """Refuse a batch in which `decoding`, a press that acts then, would not do to each row as to one alone."""
    if decoding is None:
        return
    name = type(decoding).__name__
    if n_rows > 1 and not rows_independent(decoding):
        raise ValueError(f"{name} mixes the rows of a batch while decoding; give it one row at a time")
    if not equal:
        raise ValueError(
            f"{name} compresses while decoding, which rows of unequal length cannot do together. Give it prompts "
            "(attention_mask) and questions (question_ids) of equal length, or one row at a time"
        )


def _warn_beyond_training(model: KVNeoXForCausalLM, longest: int, max_new_tokens: int) -> None:
    total, trained = longest + max_new_tokens, model.config.max_position_embeddings
    if total > trained:
        warnings.warn(
            f"max_new_tokens={max_new_tokens} goes on to position {total}, the model was trained on {trained}: expect "
            "poor text beyond",
            stacklevel=5,  # past generate and its two decorators
        )


def _interval(press, otherwise: int) -> int:
    """After how many tokens a press that acts while decoding compresses."""
    return getattr(getattr(press, "decoding_press", press), "compression_interval", otherwise)


def _read_unequal(model, prompts: list, questions: list, press, kv_bits: int | None, headroom: int, reading: dict):
    """The cache, the last hidden states (batch, d) and the next positions (batch,), when all prompts are read and
    compressed and all questions read: group by group, as only rows of one length can be read together."""
    groups, parts = readable_together(prompts, questions, press), []
    for rows in groups:
        context, question = (torch.stack([texts[row] for row in rows]) for texts in (prompts, questions))
        cache, hidden = prefill_rows(model, context, press, headroom, **reading)
        position = torch.full_like(context[:, 0], first_position(cache, context.shape[1], press))
        if kv_bits is not None:
            store(cache, press, kv_bits)
        if question.shape[1]:
            hidden = _step(model, question, position, cache)
        parts.append((cache, hidden, position + question.shape[1]))
    caches, hidden, position = zip(*parts)
    order = torch.tensor(sum(groups, [])).argsort()  # back to that of the prompts
    return CompactCache.stack(caches, order.tolist()), torch.cat(hidden)[order], torch.cat(position)[order]


def _step(model: KVNeoXForCausalLM, input_ids: torch.Tensor, position: torch.Tensor, cache: CompactCache):
    """Read (batch, n) from `position` on, one for all or one for each row; the last hidden states (batch, d)."""
    positions = position[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
    return model.model(input_ids=input_ids, past_key_values=cache, position_ids=positions).last_hidden_state[:, -1]


def choose(logits: torch.Tensor, ends: "Ends", temperature: float) -> torch.Tensor:
    """A token (batch,) each from logits (batch, vocabulary)."""
    if ends.forbidden:
        logits = logits.index_fill(1, ends.ids, -torch.inf)
    if temperature == 0:
        return logits.max(-1).indices  # on a CPU three to five times as fast as argmax
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]


class Ends:
    """Which samples of a batch have ended."""

    def __init__(
        self,
        model: KVNeoXForCausalLM,
        batch: int,
        min_new_tokens: int,
        stop_at_eos: bool,
        stop_when: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        ids = model.generation_config.eos_token_id
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        self.ids = torch.tensor(ids, dtype=torch.long, device=model.device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=model.device)
        self.stop, self.min_new_tokens = stop_at_eos and bool(ids), min_new_tokens
        self.stop_when, self.made = stop_when, []
        self.may_end = self.stop or stop_when is not None

    @property
    def forbidden(self) -> bool:
        return len(self.made) < self.min_new_tokens and len(self.ids) > 0

    @property
    def all_ended(self) -> bool:
        return self.may_end and bool(self.ended.all())

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.may_end and len(self.ids):
            tokens = torch.where(self.ended, self.ids[0], tokens)
        self.made.append(tokens)
        if self.stop:
            self.ended = self.ended | torch.isin(tokens, self.ids)
        if self.stop_when is not None and len(self.made) >= self.min_new_tokens:
            self.ended = self.ended | self.stop_when(torch.stack(self.made, 1)).to(self.ended.device)
        return tokens
