"""Decoding from what a press left of a context."""

import warnings
from dataclasses import dataclass

import torch

from kvneox_lib.measures.clock import Clock, PeakMemory
from kvneox_lib.measures.prefill import first_position, prefill_rows
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_ids, check_int, check_temperature
from kvneox_lib.neox.kernels import linear_of_few_rows
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, with_model
from kvneox_lib.presses.applying import applied
from kvneox_lib.presses.facts import decoding_part, rows_independent


@dataclass(frozen=True)
class Generation:
    tokens: torch.Tensor  # (batch, n new); a sample that has ended repeats its end-of-text token
    prefill_s: float  # to the first token
    decode_s: float  # for all others
    kv_bytes: int  # allocated when decoding ends
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
    question_ids: torch.Tensor | None = None,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    stop_at_eos: bool = True,
    temperature: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    with_logits: bool = False,
) -> Generation:
    """Compress `input_ids` (batch, T), then decode: greedily, or by drawing at a `temperature` above 0.

    Without `question_ids` the first token follows from the prefill, as in `with press(model): model.generate(...)`.
    With them (batch, n), they are read after compression, as in the kvpress pipeline. min_new_tokens: none of so many
    ends a sample.
    """
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            "attention_mask marks padding: after compression nobody knows which entries were padding. Give prompts of "
            "equal length, or one by one"
        )
    input_ids = check_ids("input_ids", input_ids, model)
    if question_ids is not None:
        question_ids = check_ids("question_ids", question_ids, model, rows=len(input_ids))
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("min_new_tokens", min_new_tokens, 0)
    check_temperature(temperature)
    n_question = 0 if question_ids is None else question_ids.shape[1]
    total, trained = input_ids.shape[1] + n_question + max_new_tokens, model.config.max_position_embeddings
    if total > trained:
        warnings.warn(
            f"max_new_tokens={max_new_tokens} goes on to position {total}, the model was trained on {trained}: expect "
            "poor text beyond",
            stacklevel=4,  # past the two decorators
        )
    decoding = decoding_part(press)
    if decoding is not None and len(input_ids) > 1 and not rows_independent(press):
        raise ValueError(f"{type(press).__name__} mixes the rows of a batch while decoding; give it one row at a time")

    peak, clock = PeakMemory(input_ids.device), Clock(input_ids.device)
    headroom = n_question + max_new_tokens
    if decoding is not None:  # then it shrinks again, however long the text becomes
        headroom = min(headroom, _interval(decoding, headroom))
    cache, hidden = prefill_rows(model, input_ids, press, headroom)
    ends = Ends(model, len(input_ids), min_new_tokens, stop_at_eos)
    position = first_position(cache, input_ids.shape[1], press)
    tokens, all_logits = [], []
    with applied(decoding, model):
        kv_lengths = cache.kv_lengths
        if question_ids is not None:
            hidden = _step(model, question_ids, position, cache)
            position += n_question
        while len(tokens) < max_new_tokens and not ends.all_ended:
            if tokens:
                hidden = _step(model, tokens[-1][:, None], position, cache)
                position += 1
            logits = linear_of_few_rows(model.embed_out, hidden)  # (batch, vocabulary)
            tokens.append(ends.apply(choose(logits, ends, temperature)))
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
        kv_lengths=kv_lengths,
        peak_bytes=peak.lap(),
        prefill_peak_bytes=prefill_peak,
        logits=torch.stack(all_logits, 1) if with_logits else None,
    )


def _interval(press, otherwise: int) -> int:
    """After how many tokens a press that acts while decoding compresses."""
    return getattr(getattr(press, "decoding_press", press), "compression_interval", otherwise)


def _step(model: KVNeoXForCausalLM, input_ids: torch.Tensor, position: int, cache: CompactCache) -> torch.Tensor:
    """Read (batch, n) from `position` on; the last hidden states (batch, d)."""
    positions = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)[None]
    return model.model(input_ids=input_ids, past_key_values=cache, position_ids=positions).last_hidden_state[:, -1]


def choose(logits: torch.Tensor, ends: "Ends", temperature: float) -> torch.Tensor:
    """A token (batch,) each from logits (batch, vocabulary)."""
    if ends.forbidden:
        logits = logits.index_fill(1, ends.ids, -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]


class Ends:
    """Which samples of a batch have ended."""

    def __init__(self, model: KVNeoXForCausalLM, batch: int, min_new_tokens: int, stop_at_eos: bool):
        ids = model.generation_config.eos_token_id
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        self.ids = torch.tensor(ids, dtype=torch.long, device=model.device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=model.device)
        self.stop, self.min_new_tokens, self.n = stop_at_eos and bool(ids), min_new_tokens, 0

    @property
    def forbidden(self) -> bool:
        return self.n < self.min_new_tokens and len(self.ids) > 0

    @property
    def all_ended(self) -> bool:
        return self.stop and bool(self.ended.all())

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        self.n += 1
        if self.stop:
            tokens = torch.where(self.ended, self.ids[0], tokens)
            self.ended = self.ended | torch.isin(tokens, self.ids)
        return tokens
