"""Reading a context under a press, and decoding from what is left of it.

Prefill happens inside the press' context manager and decoding outside it: some presses act only when it closes. After
compression positions go on from the true length, which the cache no longer knows, unless the press rotated the keys it
kept to new positions.
"""

import warnings
import weakref
from dataclasses import dataclass

import torch
from kvpress import BasePress
from transformers import Cache, DynamicCache

from kvneox_lib.measures.clock import Clock, PeakMemory
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.kernels import linear_of_few_rows
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, adapt, evictions
from kvneox_lib.presses.applying import applied, check_press
from kvneox_lib.presses.facts import acts, rerotates, rows_independent


@dataclass(frozen=True)
class Generation:
    tokens: torch.Tensor  # (batch, n new); a sample that has ended repeats its end-of-text token
    prefill_s: float  # to the first token
    decode_s: float  # for all others
    kv_bytes: int  # allocated when decoding ends
    kv_lengths: torch.Tensor  # (layers, batch, heads) entries held after compression
    peak_bytes: int | None  # of the decoding phase: the allocator's on CUDA, resident memory on Linux, else None


@torch.no_grad()
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
) -> Generation:
    """Compress `input_ids` (batch, T), then decode: greedily, or by drawing at a `temperature` above 0.

    Without `question_ids` the first token follows from the prefill, as in `with press(model): model.generate(...)`.
    With them (batch, n), they are read after compression, as in the kvpress pipeline. min_new_tokens: none of so many
    ends a sample.
    """
    model = adapt(model)
    input_ids, question_ids = checked_prompt(model, input_ids, question_ids, attention_mask)
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("min_new_tokens", min_new_tokens, 0)
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature!r}: must be 0 (greedy) or above")
    n_question = 0 if question_ids is None else question_ids.shape[1]
    total, trained = input_ids.shape[1] + n_question + max_new_tokens, model.config.max_position_embeddings
    if total > trained:
        warnings.warn(
            f"max_new_tokens={max_new_tokens} goes on to position {total}, the model was trained on {trained}: expect "
            "poor text beyond",
            stacklevel=2,
        )
    decoding = press if acts(press) == "decoding" else None
    if decoding is not None and len(input_ids) > 1 and not rows_independent(press):
        raise ValueError(f"{type(press).__name__} mixes the rows of a batch while decoding; give it one row at a time")

    clock = Clock(input_ids.device)
    headroom = n_question + max_new_tokens
    if decoding is not None:  # then it shrinks again, however long the text becomes
        headroom = min(headroom, _interval(decoding, headroom))
    cache, hidden = _prefill_batch(model, input_ids, press, headroom)
    ends = Ends(model, len(input_ids), min_new_tokens, stop_at_eos)
    position = first_position(cache, input_ids.shape[1], press)
    with applied(decoding, model):
        kv_lengths = cache.kv_lengths
        if question_ids is not None:
            hidden = _step(model, question_ids, position, cache)
            position += n_question
        tokens = [ends.apply(choose(model, hidden, ends, temperature))]
        prefill_s = clock.lap()
        peak = PeakMemory(input_ids.device)
        while len(tokens) < max_new_tokens and not ends.all_ended:
            hidden = _step(model, tokens[-1][:, None], position, cache)
            tokens.append(ends.apply(choose(model, hidden, ends, temperature)))
            position += 1
    return Generation(torch.stack(tokens, 1), prefill_s, clock.lap(), cache.kv_bytes, kv_lengths, peak.read())


def _interval(press, otherwise: int) -> int:
    """After how many tokens a press that acts while decoding compresses."""
    return getattr(getattr(press, "decoding_press", press), "compression_interval", otherwise)


def checked_prompt(model, input_ids, question_ids, attention_mask):
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            "attention_mask marks padding: after compression nobody knows which entries were padding. Give prompts of "
            "equal length, or one by one"
        )
    device = model.model.embed_tokens.weight.device
    for name, ids in (("input_ids", input_ids), ("question_ids", question_ids)):
        if ids is not None and (ids.dim() != 2 or ids.shape[1] < 1 or len(ids) != len(input_ids)):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; must be (batch, T), T at least 1, one row a sample")
    return input_ids.to(device), None if question_ids is None else question_ids.to(device)


def _prefill_batch(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int):
    """The cache, ready to be decoded from, and the last hidden states (batch, d)."""
    if len(input_ids) > 1 and not rows_independent(press):
        caches, hidden = zip(*(_prefill(model, row[None], press, headroom) for row in input_ids))
        return CompactCache.stack(caches), torch.cat(hidden)
    cache, hidden = _prefill(model, input_ids, press, headroom)
    if acts(press) != "decoding":
        cache.make_ragged()
    return cache, hidden


def _step(model: KVNeoXForCausalLM, input_ids: torch.Tensor, position: int, cache: CompactCache) -> torch.Tensor:
    """Read (batch, n) from `position` on; the last hidden states (batch, d)."""
    positions = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)[None]
    return model.model(input_ids=input_ids, past_key_values=cache, position_ids=positions).last_hidden_state[:, -1]


def choose(model: KVNeoXForCausalLM, hidden: torch.Tensor, ends: "Ends", temperature: float) -> torch.Tensor:
    logits = linear_of_few_rows(model.embed_out, hidden)  # (batch, vocabulary)
    if ends.forbidden:
        logits[:, ends.ids] = -torch.inf
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


# ---- prefill --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int = 0) -> CompactCache:
    """The cache after `press` compressed `input_ids`; what a head-wise press evicted is in `evictions(cache)`.

    headroom: how many tokens follow.
    """
    return _prefill(model, input_ids, press, headroom)[0]


def _prefill(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, headroom: int):
    """The cache, and the last hidden states (batch, d), which no press has touched."""
    if not rows_independent(press) and len(input_ids) > 1:
        raise ValueError(f"{type(press).__name__} mixes the rows of a batch; give it one row at a time")
    cache, input_ids = CompactCache(headroom), with_delimiter(press, input_ids)
    with applied(press, model):
        hidden = model.model(input_ids=input_ids, past_key_values=cache).last_hidden_state[:, -1]
    return cache, hidden


@torch.no_grad()
def prefill_each(model: KVNeoXForCausalLM, input_ids: torch.Tensor, presses: list) -> list[CompactCache]:
    """`prefill` under each press. They share one pass where they act in hooks alone: a hook runs after the attention of
    its layer, so what it evicts changes nothing in the layers above, and all presses see the same keys."""
    sharing = [(press, CompactCache(headroom=0)) for press in presses if _shares_the_pass(press, len(input_ids))]
    if len(sharing) < 2:
        return [prefill(model, input_ids, press) for press in presses]

    generator = _generator(input_ids.device)
    dice = [generator.get_state()] * len(sharing)  # each press draws what it would draw alone

    def fork(module, args, kwargs, output):
        read = kwargs["past_key_values"].layers[module.layer_idx]
        for i, (press, cache) in enumerate(sharing):
            cache.update(read.keys, read.values, module.layer_idx)
            module._last_cache = weakref.ref(cache)  # where evictions per head are written down
            if press is not None:
                generator.set_state(dice[i])
                press.forward_hook(module, args, {**kwargs, "past_key_values": cache}, output)
                dice[i] = generator.get_state()
        batch, heads, _, dim = read.keys.shape
        read.keys = read.values = read.keys.new_empty(batch, heads, 0, dim)  # no layer above needs them

    for press, _ in sharing:
        if press is not None:
            check_press(press, model)
            press.post_init_from_model(model)
    handles = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as kvpress' own context does
        handles.append(layer.self_attn.register_forward_hook(fork, with_kwargs=True))
    try:
        model.model(input_ids=input_ids, past_key_values=DynamicCache())
    finally:
        for handle in handles:
            handle.remove()
    shared = iter([cache for _, cache in sharing])
    return [
        next(shared) if _shares_the_pass(press, len(input_ids)) else prefill(model, input_ids, press)
        for press in presses
    ]


def _generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type != "cuda" else torch.cuda.default_generators[device.index or 0]


def _shares_the_pass(press, n_rows: int) -> bool:
    in_hooks = press is None or (
        type(press).__call__ is BasePress.__call__ and not hasattr(press, "delimiter_token_id")
    )
    return in_hooks and (n_rows == 1 or rows_independent(press))


def first_position(cache: Cache, n_context: int, press) -> int:
    """The position of the token that follows a compressed context of `n_context` tokens."""
    return cache.get_seq_length() if rerotates(press) else n_context


def with_delimiter(press, input_ids: torch.Tensor, window: int = 64) -> torch.Tensor:
    """For FINCH, mark where the question begins (the last `window` tokens), with an id that the text does not use."""
    if not hasattr(press, "delimiter_token_id"):
        return input_ids
    if input_ids.shape[1] <= window:
        raise ValueError(f"FINCH takes the last {window} tokens for the question; the context has {input_ids.shape[1]}")
    unused = next(i for i in range(input_ids.max() + 2) if not (input_ids == i).any())
    press.delimiter_token_id = unused
    return torch.cat([input_ids[:, :-window], input_ids.new_full((1, 1), unused), input_ids[:, -window:]], dim=1)


def kept_counts(cache: Cache) -> torch.Tensor:
    """(layers, batch, heads): entries that each head still sees."""
    counts = []
    for index, held in enumerate(cache.layers):
        count = held.keys.new_full(held.keys.shape[:2], held.keys.shape[2], dtype=torch.long)
        if evictions(cache).get(index) is not None:
            batch, head, _ = (part.to(count.device) for part in evictions(cache)[index])
            count.index_put_((batch, head), count.new_tensor(-1), accumulate=True)
        counts.append(count)
    return torch.stack(counts)


@torch.no_grad()
def kept_positions(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press) -> torch.Tensor:
    """(layers, batch, heads, T) booleans: which tokens survive. Found by looking the kept keys up among all keys."""
    if rerotates(press):
        raise ValueError("this press rotates the keys it keeps; ask for the positions of the press inside it")
    return positions_in(*prefill_each(model, input_ids, [press, None]))


def positions_in(compressed: Cache, full: Cache) -> torch.Tensor:
    """(layers, batch, heads, T) booleans: which keys of `full` are still seen in `compressed`."""
    head_dim = full.layers[0].keys.shape[-1]
    direction = torch.randn(head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = []
    for layer, (all_of, some) in enumerate(zip(full.layers, compressed.layers)):
        tags, kept_tags = ((held.keys.double().cpu() @ direction) for held in (all_of, some))  # one number per key
        order = tags.argsort(-1)
        found = torch.searchsorted(tags.gather(-1, order), kept_tags).clamp(max=tags.shape[-1] - 1)
        positions = order.gather(-1, found)
        if not torch.equal(tags.gather(-1, positions), kept_tags):
            raise ValueError("this press changes the keys it keeps, so their positions cannot be read off")
        mask = torch.zeros_like(tags, dtype=torch.bool).scatter_(-1, positions, True)
        if evictions(compressed).get(layer) is not None:
            mask[tuple(part.cpu() for part in evictions(compressed)[layer])] = False
        kept.append(mask)
    return torch.stack(kept)


@torch.no_grad()
def greedy(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, n_new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, n_new) and the logits that chose them: prefill inside the press, decoding outside it.

    The last token of the prompt is fed after compression, so that every logit has read the compressed cache.
    """
    context, token, length = input_ids[:, :-1], input_ids[:, -1:], input_ids.shape[1] - 1
    cache = prefill(model, context, press)
    while_decoding = press if acts(press) == "decoding" else None
    tokens, logits = [], []
    with applied(while_decoding, model):
        start = first_position(cache, length, press)
        for step in range(n_new):
            logits.append(linear_of_few_rows(model.embed_out, _step(model, token, start + step, cache)))
            token = logits[-1].argmax(-1, keepdim=True)
            tokens.append(token)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)
