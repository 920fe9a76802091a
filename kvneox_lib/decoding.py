"""Reading a context under a press, and decoding from what is left of it.

Prefill happens inside the press' context manager and decoding outside it: some presses act only when it closes. After
compression positions go on from the true length, which the cache no longer knows, unless the press rotated the keys it
kept to new positions.
"""

import weakref

import torch
from kvpress import BasePress
from transformers import Cache, DynamicCache

from kvneox_lib.modeling import KVNeoXForCausalLM, evictions
from kvneox_lib.presses import acts, applied, check_press, rerotates, rows_independent


@torch.no_grad()
def prefill(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press) -> Cache:
    """The cache after `press` compressed `input_ids`; what a head-wise press evicted is in `evictions(cache)`."""
    if not rows_independent(press) and len(input_ids) > 1:
        raise ValueError(f"{type(press).__name__} mixes the rows of a batch; give it one row at a time")
    cache, input_ids = DynamicCache(), with_delimiter(press, input_ids)
    with applied(press, model):
        model.model(input_ids=input_ids, past_key_values=cache)
    return cache


@torch.no_grad()
def prefill_each(model: KVNeoXForCausalLM, input_ids: torch.Tensor, presses: list) -> list[Cache]:
    """`prefill` under each press. They share one pass where they act in hooks alone: a hook runs after the attention of
    its layer, so what it evicts changes nothing in the layers above, and all presses see the same keys."""
    sharing = [(press, DynamicCache()) for press in presses if _shares_the_pass(press, len(input_ids))]
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
        read.keys, read.values = read.keys[:, :, :0], read.values[:, :, :0]  # no layer above needs them

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
            position = torch.full_like(token, start + step)
            logits.append(model(token, past_key_values=cache, position_ids=position).logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
            tokens.append(token)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)
