"""GPT-NeoX seen as a Llama-like model, so that every kvpress press works on it unpatched.

The one real difference is the rotary embedding. NeoX rotates the first r of D head dimensions and pairs i with i + r/2;
Llama rotates all D and pairs i with i + D/2. Attention sees queries and keys only through q.k, which does not change
when the dimensions of both are reordered alike. So queries and keys are put into "half-split" order (see `half_split`),
the frequencies are padded with zeros, and from then on everything that kvpress computes is exact. Values are untouched.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remembered
from functools import wraps

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from transformers.activations import GELUActivation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXLayer,
    GPTNeoXMLP,
    GPTNeoXPreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs

from kvneox_lib.neox.hooks import in_turn, is_pressed, refuse_attached, refuse_padding, turn
from kvneox_lib.neox.kernels import (
    attend_turned,
    attend_with_few_queries,
    attend_with_one_query,
    is_for_few_queries,
    is_in_place,
    is_plain,
    is_watched,
    linear_of_few_rows,
    may_be_turned,
    one_query_is_faster_alone,
    read_layers,
)
from kvneox_lib.neox.masks import LayerMasks, as_additive

TOKENS_PER_SLICE = 2048  # of the MLP


def half_split(x: torch.Tensor, rotary_ndims: int, dim: int = -1) -> torch.Tensor:
    """NeoX order to Llama order along `dim`: rotary pair i goes to i and i + D/2, unrotated dimensions after them."""
    half, rest = rotary_ndims // 2, (x.shape[dim] - rotary_ndims) // 2
    first, second, unrotated_1, unrotated_2 = x.split([half, half, rest, rest], dim)
    return torch.cat([first, unrotated_1, second, unrotated_2], dim)


class PaddedRotary(nn.Module):
    """The model's own rotary embedding in half-split order: unrotated dimensions have frequency 0, cos 1 and sin 0.

    All is computed from the wrapped module when asked for: buffers of our own would come back uninitialised from
    `from_pretrained`, which builds modules on the meta device.
    """

    def __init__(self, native: nn.Module, head_dim: int):
        super().__init__()
        self.native = native
        self.head_dim = head_dim

    @property
    def inv_freq(self) -> torch.Tensor:
        frequencies = self.native.inv_freq
        return pad(frequencies, (0, self.head_dim // 2 - frequencies.shape[-1]))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.native(x, position_ids)  # (batch, T, r), its two halves alike
        half = cos.shape[-1] // 2
        padding = (0, self.head_dim // 2 - half)
        cos, sin = pad(cos[..., :half], padding, value=1.0), pad(sin[..., :half], padding)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)  # (batch, T, D)


class FusedSlice:
    """The query, key or value part of `query_key_value`, as the `q_proj`, `k_proj`, `v_proj` that kvpress calls.

    It owns nothing. The fused projection is interleaved per head (q, k, v of head 0, then of head 1, ...); the three
    are *not* contiguous blocks.
    """

    def __init__(self, attention: "KVNeoXAttention", part: int):
        self.attention, self.part = attention, part

    def _take(self, fused: torch.Tensor, dim: int) -> torch.Tensor:
        """Select this part along the fused dimension `dim`, queries and keys in half-split order."""
        attention = self.attention
        sizes = (-1, 3, attention.head_dim)  # heads, (q, k, v), D
        part = fused.unflatten(dim, sizes).select(dim + 1, self.part)
        if self.part < 2:
            part = half_split(part, attention.rotary_ndims, dim=dim + 1)
        return part.flatten(dim, dim + 1)

    @property
    def weight(self) -> torch.Tensor:
        return self._take(self.attention.query_key_value.weight, 0)

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.attention.query_key_value.bias
        return None if bias is None else self._take(bias, 0)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        fused = self.attention.query_key_value
        if is_plain(fused):
            return linear(hidden_states, self.weight, self.bias)
        # Quantized, adapted (LoRA) or offloaded: only the module itself knows how to multiply.
        return self._take(fused(hidden_states), hidden_states.dim() - 1)


def evictions(cache: Cache) -> dict[int, tuple[torch.Tensor, ...] | None]:
    """Layer index to the (batch, head, position) of entries that are still in `cache` but must not be seen."""
    return cache.__dict__.setdefault("kvneox_evictions", {})


class EvictionsFollow:
    """For a Cache: what is done to its rows and its length is done to its evictions, too."""

    def reorder_cache(self, beam_idx):
        self._take_rows(lambda rows: rows[beam_idx.to(rows.device)])
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self._take_rows(lambda rows: rows.repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        self._take_rows(lambda rows: rows[torch.as_tensor(indices).to(rows.device)])
        super().batch_select_indices(indices)

    def crop(self, max_length):
        super().crop(max_length)
        for layer, evicted in _acting(self):
            left = evicted[2].to("cpu") < self.layers[layer].get_seq_length()
            evictions(self)[layer] = tuple(part[left.to(part.device)] for part in evicted)

    def reset(self):
        super().reset()
        evictions(self).clear()

    def _take_rows(self, taken: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """taken: the rows that are there (batch,) to those that come in their places."""
        for layer, (batch, head, position) in _acting(self):
            rows = taken(torch.arange(len(self.layers[layer].keys), device=batch.device))
            row, entry = (rows[:, None] == batch).nonzero(as_tuple=True)
            evictions(self)[layer] = row, *(part[entry.to(part.device)] for part in (head, position))

    def __reduce__(self):
        """By the class that it had: one that is made while running cannot be found by name."""
        return _rebuilt, (getattr(self, "kvneox_class", type(self)),), self.__dict__


def _acting(cache: Cache) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
    return [(layer, tuple(evicted)) for layer, evicted in evictions(cache).items() if evicted is not None]


@remembered
def _following(kind: type[Cache]) -> type[Cache]:
    """That kind of cache, taking its evictions along. Others make caches too, and hand them to us."""
    if issubclass(kind, EvictionsFollow):
        return kind
    return type(kind.__name__, (EvictionsFollow, kind), {"kvneox_class": kind, "__doc__": kind.__doc__})


def _rebuilt(kind: type[Cache]) -> Cache:
    return Cache.__new__(_following(kind))


class KVNeoXAttention(GPTNeoXAttention):
    """NeoX attention under the names that kvpress reads; its cache holds keys in half-split order."""

    num_key_value_groups = 1
    _last_cache = None  # a weak reference to the cache that the last forward used
    _last_written: tuple[torch.Tensor, ...] | None = None

    head_dim = property(lambda self: self.head_size)
    _dropout = property(lambda self: self.attention_dropout if self.training else 0.0)
    q_proj = property(lambda self: FusedSlice(self, 0))
    k_proj = property(lambda self: FusedSlice(self, 1))
    v_proj = property(lambda self: FusedSlice(self, 2))
    o_proj = property(lambda self: self.dense)

    @property
    def masked_key_indices(self) -> tuple[torch.Tensor, ...] | None:
        """(batch, head, position) of entries that a head-wise press evicted but left in place; see `_attend`.

        kvpress keeps them in the module. Here those that act are kept with the cache that they are about, so that a
        model can hold several conversations, and a copied cache takes them along. Who asks when that cache is gone
        reads what was written last.
        """
        cache = self._last_cache and self._last_cache()
        return self._last_written if cache is None else evictions(cache).get(self.layer_idx)

    @masked_key_indices.setter
    def masked_key_indices(self, indices):
        self._last_written = indices
        cache = self._last_cache and self._last_cache()
        if cache is not None:
            if indices is not None:
                cache.__class__ = _following(type(cache))
            evictions(cache)[self.layer_idx] = indices

    def __getstate__(self):
        """A copy has read nothing; nor can a weak reference be pickled."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_last_cache", "_last_written")}

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        cache_position=None,
        position_embeddings=None,
        **kwargs,
    ):
        self._last_cache = None if past_key_values is None else weakref.ref(past_key_values)
        fused = linear_of_few_rows(self.query_key_value, hidden_states)
        held = past_key_values.layers[self.layer_idx : self.layer_idx + 1] if past_key_values is not None else []
        if (
            held
            and goes_on(self.config, attention_mask, past_key_values, held[0], self.layer_idx)
            and may_be_turned(fused, position_embeddings[0])
            and not self._dropout
        ):
            output = attend_turned(fused, *position_embeddings, self.rotary_ndims // 2, held[0], self.scaling)
            return linear_of_few_rows(self.dense, output), None
        query, key, value = self._turned(fused, *position_embeddings)
        if held and hasattr(held[0], "attend"):  # its heads hold different entries; see RaggedLayer
            if (
                getattr(attention_mask, "padding", None) is not None
                or getattr(attention_mask, "given", None) is not None
            ):
                raise ValueError(
                    "attention_mask marks padding or what is seen, but not of the entries held here. For prompts of "
                    "unequal length use kvneox_lib.generate(attention_mask=...)"
                )
            output, weights = held[0].attend(query, key, value, self.scaling).transpose(1, 2), None
        else:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})
            output, weights = self._attend(query, key, value, attention_mask, past_key_values, **kwargs)
        return linear_of_few_rows(self.dense, output.flatten(2)), weights

    def _turned(self, fused, cos, sin):
        """Rotated queries, rotated keys and values, each (batch, heads, T, D), the first two in half-split order."""
        half, rest = self.rotary_ndims // 2, (self.head_size - self.rotary_ndims) // 2
        query, key, value = fused.unflatten(-1, (-1, 3 * self.head_size)).transpose(1, 2).chunk(3, dim=-1)
        # Only the rotary part is multiplied; the order changes in the one copy that is made anyway.
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        rotated = []
        for x in (query, key):
            first, second, unrotated_1, unrotated_2 = x.split([half, half, rest, rest], dim=-1)
            turned = [first * cos - second * sin, unrotated_1, second * cos + first * sin, unrotated_2]
            rotated.append(torch.cat(turned, dim=-1))
        return *rotated, value

    def _attend(self, query, key, value, attention_mask, cache, **kwargs):
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kv_len = key.shape[2]
        if query.shape[2] == kv_len:
            self.masked_key_indices = None  # a new prefill: what was evicted from this cache before no longer counts
        evicted = None if cache is None else evictions(cache).get(self.layer_idx)
        masks_itself = not implementation.startswith("flash")
        # where dtypes differ torch says what is wrong
        alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape
        ours = implementation == "sdpa" and alike and not self._dropout
        if isinstance(attention_mask, LayerMasks):
            if ours and attention_mask.only_causal(evicted) and is_for_few_queries(query):
                return attend_with_few_queries(query, key, value, self.scaling).transpose(1, 2), None
            attention_mask = attention_mask.for_layer(query, kv_len, evicted if masks_itself else None)
        if attention_mask is not None and attention_mask.device != query.device:
            attention_mask = attention_mask.to(query.device)
        if ours and attention_mask is None and one_query_is_faster_alone(query):
            rows = (states.flatten(0, 1) for states in (query, key, value))
            return attend_with_one_query(*rows, self.scaling).view(query.shape).transpose(1, 2), None
        if implementation == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = as_additive(attention_mask, query.dtype)
        if masks_itself:
            # kvpress would now search for a fake key that hides the evicted entries; the mask hides them exactly.
            self.masked_key_indices = None
        try:
            settings = {"scaling": self.scaling, "dropout": self._dropout}
            return attend(self, query, key, value, attention_mask, **settings, **kwargs)
        finally:
            self.masked_key_indices = evicted


class KVNeoXLayer(GPTNeoXLayer):
    """The stock layer, calling its attention with the keywords that the hooks of kvpress read."""

    self_attn = property(lambda self: self.attention)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        attended, _ = self.attention(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        attended = self.post_attention_dropout(attended)
        if self.use_parallel_residual:
            return self._feed(hidden_states) + attended + hidden_states
        attended = attended + hidden_states
        return self._feed(attended) + attended

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP, in slices of the sequence: between its two layers a token takes four times the room."""
        n_tokens = max(1, TOKENS_PER_SLICE // x.shape[0])
        if torch.is_grad_enabled() or x.shape[1] <= n_tokens:
            return self.post_mlp_dropout(self._mlp(self.post_attention_layernorm(x)))
        output = torch.empty_like(x)
        for part, into in zip(x.split(n_tokens, dim=1), output.split(n_tokens, dim=1)):
            into.copy_(self._mlp(self.post_attention_layernorm(part)))
        return self.post_mlp_dropout(output)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        if is_watched(self.mlp):
            return self.mlp(x)
        return linear_of_few_rows(self.mlp.dense_4h_to_h, self.mlp.act(linear_of_few_rows(self.mlp.dense_h_to_4h, x)))


class KVNeoXPreTrainedModel(GPTNeoXPreTrainedModel):
    _no_split_modules = ["KVNeoXLayer"]
    _supports_flex_attn = False  # its block masks know one length for all layers
    _can_record_outputs = {"hidden_states": KVNeoXLayer, "attentions": KVNeoXAttention}
    _keys_to_ignore_on_load_unexpected = [
        r"attention\.bias",
        r"attention\.masked_bias",
        r"attention\.rotary_emb\.inv_freq",
    ]

    @in_turn
    def __call__(self, *args, **kwargs):
        """In a turn, lest a press of another thread act on this pass. Not in `forward`, which a press may replace."""
        if not torch.compiler.is_compiling():
            refuse_padding(self, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
        return super().__call__(*args, **kwargs)

    def _flash_attn_2_can_dispatch(self, is_init_check: bool = False) -> bool:
        try:
            return super()._flash_attn_2_can_dispatch(is_init_check)
        except ImportError as error:
            raise ImportError(
                'attn_implementation="flash_attention_2" needs a CUDA GPU and the package flash-attn '
                '(pip install flash-attn --no-build-isolation). Without it use attn_implementation="sdpa", '
                'or "eager" for presses that read attention weights.'
            ) from error


class KVNeoXModel(KVNeoXPreTrainedModel, GPTNeoXModel):
    """The stock decoder with Llama's names, padded rotary embedding and a mask for each layer."""

    embed_tokens = property(lambda self: self.embed_in)

    def __init__(self, config: GPTNeoXConfig):
        super().__init__(config)
        # The layers were built stock; see them as ours.
        _see_as_llama(self)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        use_cache=None,
        cache_position=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_in(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if getattr(past_key_values, "bits", None):
            self._settle(past_key_values, inputs_embeds.shape[1])
        if cache_position is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            cache_position = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)
        if position_ids is None:
            position_ids = cache_position[None]

        if past_key_values is not None and past_key_values.is_compileable:
            # A static cache hands out its unused slots too; the stock mask knows which are filled.
            masks = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                cache_position=cache_position,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        else:
            masks = LayerMasks(attention_mask, self.config._attn_implementation)

        hidden_states = self.emb_dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self._is_a_step(hidden_states, position_embeddings[0], masks, past_key_values):
            hidden_states = self._step(hidden_states, past_key_values, *position_embeddings)
        else:
            for layer in self.layers:
                hidden_states = layer(
                    hidden_states,  # positionally: the capture of hidden states reads args[0]
                    attention_mask=masks,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    cache_position=cache_position,
                    position_embeddings=position_embeddings,
                    **kwargs,
                )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layer_norm(hidden_states), past_key_values=past_key_values
        )

    def _settle(self, cache: Cache, n_tokens: int) -> None:
        """Have a cache in few bits keep so what it holds, unless a press has still to see it: some read it again."""
        if not is_pressed(self):
            cache.settle()
        elif n_tokens == 1:
            warnings.warn(
                f"CompactCache(bits={cache.bits}) keeps all as it is while a press is attached. Decode outside its "
                "`with` statement, as the kvpress pipeline does; a press that acts while decoding cannot be served",
                stacklevel=3,
            )

    def _is_a_step(self, x: torch.Tensor, cos: torch.Tensor, masks, cache: Cache | None) -> bool:
        """Whether all layers can be gone through in one call: a few tokens go on from what a cache of ours holds, see
        all of it, and nothing watches or has changed what is in between."""
        return (
            x.shape[0] * x.shape[1] <= 4
            and x.shape[2] == self.config.hidden_size
            and cache is not None
            and len(cache.layers) == len(self.layers)  # one that has read nothing may have none
            and self.config.use_parallel_residual
            and may_be_turned(x, cos)
            and all(goes_on(self.config, masks, cache, layer, index) for index, layer in enumerate(cache.layers))
            and len({getattr(layer, "bits", 0) for layer in cache.layers}) == 1
            and not self.training
            and self._is_untouched(x.dtype)
        )

    def _is_untouched(self, dtype: torch.dtype) -> bool:
        if self.__dict__.get("kvneox_untouched") == dtype:  # then only a press may have come
            return not any(layer.attention._forward_hooks for layer in self.layers)
        return all(_is_untouched(layer, index, self.layers[0], dtype) for index, layer in enumerate(self.layers))

    def _step(self, x: torch.Tensor, cache: Cache, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer.attention._last_cache = weakref.ref(cache)
        (batch, n, _), heads = x.shape, self.config.num_attention_heads
        rooms = [held.make_room(batch, heads, n, cos.shape[-1], x.dtype) for held in cache.layers]
        return read_layers(self.layers, rooms, x, cos, sin)


@contextmanager
def left_untouched(model: "KVNeoXForCausalLM") -> Iterator[None]:
    """Within it nothing but presses changes the model, so that each step need not look through all of it: that would
    take a tenth of a step."""
    decoder = model.model
    if decoder._is_untouched(model.dtype):
        decoder.__dict__["kvneox_untouched"] = model.dtype
    try:
        yield
    finally:
        decoder.__dict__.pop("kvneox_untouched", None)


def goes_on(config: GPTNeoXConfig, masks, cache: Cache, layer, index: int) -> bool:
    """Whether tokens are read behind what a layer of a cache of ours holds, and see all of it."""
    return (
        hasattr(layer, "make_room")
        and layer.get_seq_length() > 0
        and config._attn_implementation == "sdpa"
        and isinstance(masks, LayerMasks)
        and masks.only_causal(evictions(cache).get(index))
    )


def _is_untouched(layer: nn.Module, index: int, first: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is as the config says, and as the first one: compiled code asks no further."""
    attention, mlp, config = layer.attention, layer.mlp, layer.attention.config
    norms = layer.input_layernorm, layer.post_attention_layernorm
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        attention.query_key_value: (3 * width, width),
        attention.dense: (width, width),
        mlp.dense_h_to_4h: (inner, width),
        mlp.dense_4h_to_h: (width, inner),
    }
    own_classes = type(layer) is KVNeoXLayer and type(attention) is KVNeoXAttention and type(mlp) is GPTNeoXMLP
    return (
        own_classes
        and type(mlp.act) is GELUActivation
        and attention.layer_idx == index
        and attention.scaling == first.attention.scaling
        and attention.rotary_ndims == first.attention.rotary_ndims
        and not any(map(is_watched, (layer, attention, mlp, mlp.act, *norms)))
        and all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
        and all(norm.eps == first.input_layernorm.eps and norm.weight.shape == (width,) for norm in norms)
        and all(is_plain(product) and product.weight.shape == shape for product, shape in shapes.items())
        and all(part.weight.dtype == dtype and is_in_place(part) for part in (*norms, *shapes))
    )


class KVNeoXForCausalLM(KVNeoXPreTrainedModel, GPTNeoXForCausalLM):
    """GPT-NeoX with the parameters and state dict of the stock class, ready for every press."""

    model = property(lambda self: self.gpt_neox)

    def __init__(self, config: GPTNeoXConfig):
        super().__init__(config)
        _see_as_llama(self)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        cache_position=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As stock, which passes `input_ids` positionally: KVzip and KVgrad read it from the keywords."""
        outputs = self.gpt_neox(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cache_position=cache_position,
            **kwargs,
        )
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = linear_of_few_rows(self.embed_out, outputs.last_hidden_state[:, wanted])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


ADAPTED_CLASSES = {
    GPTNeoXForCausalLM: KVNeoXForCausalLM,
    GPTNeoXModel: KVNeoXModel,
    GPTNeoXLayer: KVNeoXLayer,
    GPTNeoXAttention: KVNeoXAttention,
}


def adapt(model: nn.Module) -> KVNeoXForCausalLM:
    """Turn a loaded stock GPT-NeoX causal LM into ours, in place and without touching a parameter."""
    if isinstance(model, KVNeoXForCausalLM):
        return model
    if type(model) is not GPTNeoXForCausalLM:
        raise ValueError(f"model is a {type(model).__name__}; allowed is transformers' GPTNeoXForCausalLM itself")
    with turn(model):
        return _see_as_llama(model)


def with_model(function: Callable) -> Callable:
    """`function(model, ...)` for any GPT-NeoX causal LM: adapted on the way in, and in a turn of the model's, with
    nothing attached that would act on what is read."""

    @wraps(function)
    def on_adapted(model, *args, **kwargs):
        with turn(adapt(model)):
            refuse_attached(model)
            return function(model, *args, **kwargs)

    return on_adapted


def _see_as_llama(model: nn.Module) -> nn.Module:
    decoder, config = model.base_model, model.config
    head_dim, share = config.hidden_size // config.num_attention_heads, config.rope_parameters["partial_rotary_factor"]
    if getattr(config, "head_dim", None) not in (None, head_dim):
        raise ValueError(
            f"head_dim={config.head_dim!r}: with hidden_size={config.hidden_size} and num_attention_heads="
            f"{config.num_attention_heads} allowed is {head_dim}, that of the stock attention"
        )
    if not 0 < share <= 1:
        raise ValueError(f"rotary_pct={share!r}: allowed is a number above 0 and up to 1")
    if head_dim % 2 or int(head_dim * share) % 2:
        raise ValueError(f"head_dim={head_dim}, {int(head_dim * share)} of it rotary: allowed are even numbers")
    for module in list(model.modules()):
        adapted = ADAPTED_CLASSES.get(type(module))
        if adapted is None:
            continue
        module.__class__ = adapted
        if hasattr(module, "_old_forward"):
            # accelerate keeps the unhooked forward bound to the class that the module had
            module._old_forward = adapted.forward.__get__(module)
        if issubclass(adapted, KVNeoXPreTrainedModel):
            module._no_split_modules = set(adapted._no_split_modules)
            _CAN_RECORD_REGISTRY[str(adapted)] = adapted._can_record_outputs  # else only __init__ writes it
    config.num_key_value_heads = config.num_attention_heads
    config.head_dim = head_dim
    config.rotary_pct = share  # transformers 5.2 saves it under another name than it reads, and would come back to 0.25
    if not isinstance(decoder.rotary_emb, PaddedRotary):
        decoder.rotary_emb = PaddedRotary(decoder.rotary_emb, head_dim)
    return model


def stock_twin(model: KVNeoXForCausalLM, attn_implementation: str = "eager") -> GPTNeoXForCausalLM:
    """transformers' own class around the same weights."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        stock = GPTNeoXForCausalLM(config)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.gpt_neox.rotary_emb = type(stock.gpt_neox.rotary_emb)(config, device=model.device)  # its buffers were meta
    return stock.eval()


AutoModelForCausalLM.register(GPTNeoXConfig, KVNeoXForCausalLM, exist_ok=True)
