"""Text without end in constant memory: the first tokens (attention sinks) and a window of the last ones (StreamingLLM,
arXiv:2309.17453). How, is in `ring`.
"""

from collections.abc import Iterator

import torch
from tokenizers.decoders import DecodeStream

from kvneox_lib.measures.decoding import Ends, choose
from kvneox_lib.measures.perplexity import score
from kvneox_lib.neox.checks import check_ids, check_int, check_temperature
from kvneox_lib.neox.hooks import refuse_attached, turn
from kvneox_lib.neox.kernels import linear_of_few_rows
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, adapt, with_model
from kvneox_lib.neox.ring import StreamingCache, check_settings

TOKENS_AT_ONCE = 1024  # of a text that is read


@torch.no_grad()
@with_model
def streaming_nll(
    model, input_ids: torch.Tensor, *, n_sink: int, window: int, rerotate: bool = True, chunk: int = TOKENS_AT_ONCE
) -> torch.Tensor:
    """(batch, T - 1): nll of each token but the first; query t sees the first `n_sink` tokens, the `window` tokens
    before it, and itself.

    rerotate: a sink's distance is that between slots, n_sink + window at most; else the true one. chunk: tokens read at
    once, which changes time and memory alone.
    """
    input_ids = check_ids("input_ids", input_ids, model, least=2)
    check_int("chunk", chunk, 1)
    cache, nll = StreamingCache(model, n_sink, window, rerotate), []
    for start in range(0, input_ids.shape[1] - 1, chunk):
        targets = input_ids[:, start + 1 : start + 1 + chunk]
        hidden = _read(model, input_ids[:, start : start + targets.shape[1]], cache)
        nll.append(score(model, hidden, targets)[0])
    return torch.cat(nll, dim=1)


@torch.no_grad()
@with_model
def recomputed_nll(model, input_ids: torch.Tensor, *, window: int, positions: torch.Tensor) -> torch.Tensor:
    """(batch, n): nll of the token after each of `positions` (n,), from keys computed anew from the `window` tokens
    before it and itself, at positions from 0 on. It costs a pass over a window for every token, hence the choice."""
    input_ids = check_ids("input_ids", input_ids, model, least=2)
    check_settings(0, window)
    if window + 1 > model.config.max_position_embeddings:
        raise ValueError(f"window={window}: must be below {model.config.max_position_embeddings}, the trained length")
    last = input_ids.shape[1] - 2
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) <= last:
        raise ValueError(f"positions={positions.tolist()}: must be from 0 to {last}, so that a token follows")
    nll = [input_ids.new_empty(len(input_ids), 0, dtype=torch.float32)]
    for position in positions.tolist():
        seen = input_ids[:, max(0, position - window) : position + 1]
        hidden = model.model(input_ids=seen, use_cache=False).last_hidden_state[:, -1:]
        nll.append(score(model, hidden, input_ids[:, position + 1 : position + 2])[0])
    return torch.cat(nll, dim=1)


def _read(model: KVNeoXForCausalLM, input_ids: torch.Tensor, cache: StreamingCache) -> torch.Tensor:
    """The last hidden states (batch, n, d)."""
    return model.model(input_ids=input_ids, **cache.arguments(input_ids.shape[1], input_ids.device)).last_hidden_state


class StreamingDecoder:
    """Generation without end on `n_sink` first tokens and a window of the last ones.

    As an iterator, several turns through one cache:

        decoder = StreamingDecoder(4, 1020)
        for piece in decoder.stream(model, input_ids, tokenizer=tokenizer): print(piece, end="")

    or under transformers' own generation, until `remove()` or the end of a with statement:

        with decoder.register(model):
            model.generate(input_ids, max_new_tokens=10_000)
    """

    stands_in = "a stream of its own"  # while it is registered; see `attached`

    def __init__(self, n_sink: int, window: int, rerotate: bool = True):
        check_settings(n_sink, window)
        self.n_sink, self.window, self.rerotate = n_sink, window, rerotate
        self.cache: StreamingCache | None = None
        self._model = self._hook = self._unread = None
        self._turn, self._interrupted = 0, False

    @property
    def max_capacity(self) -> int:
        """Entries that a query sees beside its own."""
        return self.n_sink + self.window

    @property
    def compression_count(self) -> int:
        """In this stream: how often a layer, called with more than max_capacity read, held on to those alone."""
        return sum(layer.n_compressions for layer in self.cache.layers) if self.cache else 0

    @property
    def n_seen(self) -> int:
        """Tokens read in this stream."""
        return self.cache.get_seq_length() if self.cache else 0

    @property
    def kv_bytes(self) -> int:
        return self.cache.kv_bytes if self.cache else 0

    def reset(self) -> None:
        """Forget the stream; the next one begins anew."""
        self.cache = self._unread = None
        self._turn, self._interrupted = self._turn + 1, False

    # ---- the iterator ----

    def stream(
        self,
        model,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int | None = None,
        stop_at_eos: bool = True,
        temperature: float = 0.0,
        tokenizer=None,
    ) -> Iterator[torch.Tensor | str]:
        """Read `input_ids` (batch, n) after all that was read and said before; then yield a token (batch,) at a time,
        or with a `tokenizer` the text of a single row as it becomes complete. Without `max_new_tokens` it ends at the
        end of text alone, and without `stop_at_eos` never.

        Settings and ids are checked now, the ids are read when the first token is asked for.
        """
        model = adapt(model)
        input_ids = check_ids("input_ids", input_ids, model)
        if max_new_tokens is not None:
            check_int("max_new_tokens", max_new_tokens, 1)
        check_temperature(temperature)
        if tokenizer is not None and len(input_ids) > 1:
            raise ValueError(f"tokenizer: text is streamed for one row, input_ids has {len(input_ids)}")
        self._continue(model).check(len(input_ids))
        self._turn += 1
        ends = Ends(model, len(input_ids), 0, stop_at_eos)
        tokens = self._tokens(model, input_ids, ends, max_new_tokens, temperature, self._turn)
        return tokens if tokenizer is None else _pieces(tokens, tokenizer)

    def _tokens(self, model, input_ids, ends: Ends, max_new_tokens: int | None, temperature: float, turn: int):
        n = 0
        while n != max_new_tokens and not ends.all_ended:
            if turn != self._turn:
                raise ValueError("this turn is over: another one, or another stream, has begun on its decoder")
            logits = self._read_in_chunks(model, input_ids)
            self._unread = ends.apply(choose(logits, ends, temperature))  # to be read before what comes next
            yield self._unread
            input_ids, n = input_ids[:, :0], n + 1

    def read(self, model, input_ids: torch.Tensor) -> torch.Tensor:
        """Read (batch, n) on from where the stream is; logits (batch, vocabulary) of what follows."""
        model = adapt(model)
        input_ids = check_ids("input_ids", input_ids, model)
        self._turn += 1
        return self._read_in_chunks(model, input_ids)

    @torch.no_grad()
    def _read_in_chunks(self, model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) of what follows, once what was said last is read too."""
        cache = self._continue(model)
        cache.check(len(input_ids))
        if self._interrupted:
            raise ValueError("this stream was interrupted while it read; reset() begins a new one")
        if self._unread is not None:
            input_ids = torch.cat([self._unread[:, None], input_ids], dim=1)
        with turn(model):
            refuse_attached(model, but=self)
            self._interrupted = True
            for part in input_ids.split(TOKENS_AT_ONCE, dim=1):
                hidden = _read(model, part, cache)[:, -1]
            self._unread, self._interrupted = None, False
            return linear_of_few_rows(model.embed_out, hidden)

    def _continue(self, model: KVNeoXForCausalLM) -> StreamingCache:
        if self.cache is None:
            self.cache, self._model = StreamingCache(model, self.n_sink, self.window, self.rerotate), model
        if self._model is not model:
            raise ValueError("model is not the one that this stream began with; reset() forgets the stream")
        return self.cache

    # ---- under model.generate ----

    def register(self, model) -> "StreamingDecoder":
        """Let the model keep its cache here from now on. Each call of `generate` is a new stream, unless it is given
        this one with past_key_values=decoder.cache and all of the text so far: it never reads what it says last."""
        model = adapt(model)
        hooks = model.model._forward_pre_hooks.values()
        if self._hook is not None or any(
            hasattr(hook, "__self__") and isinstance(hook.__self__, StreamingDecoder) for hook in hooks
        ):
            raise ValueError("this decoder, or another one on this model, is registered already; remove() it first")
        self.reset()
        self._continue(model)
        self._hook = model.model.register_forward_pre_hook(self._take_over, with_kwargs=True)
        return self

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> "StreamingDecoder":
        if self._hook is None:
            raise ValueError("nothing is registered; write `with decoder.register(model):`")
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def _take_over(self, module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        refuse_attached(self._model, but=self)
        given = kwargs.get("past_key_values")
        if given is None or given is not self.cache:
            if given is not None and given.get_seq_length():
                raise ValueError("past_key_values was filled elsewhere; give decoder.cache, or none")
            self.reset()
            self._continue(self._model)
        read = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        (read,) = (states for states in read if states is not None)
        self.cache.check(len(read))
        return args, {**kwargs, **self.cache.arguments(read.shape[1], read.device)}


def _pieces(tokens: Iterator[torch.Tensor], tokenizer) -> Iterator[str]:
    """A character may take several tokens: a piece is what is complete."""
    decode = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        piece = decode.step(tokenizer.backend_tokenizer, int(token))
        if piece:
            yield piece
