"""What the queries of one forward pass may see, layer by layer."""

import torch


class LayerMasks:
    """After compression layers can hold different numbers of keys, so a layer's mask follows from its own lengths.

    Query i sees the first kv_len - q_len + i + 1 keys. Masks are boolean, and None where every key is visible or where
    the kernel's own causal mask is right.
    """

    def __init__(self, attention_mask: torch.Tensor | None, implementation: str):
        self.given = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        padded = attention_mask is not None and self.given is None and not attention_mask.all()
        self.padding = attention_mask.bool() if padded else None  # (batch, tokens)
        self.implementation = implementation
        self.causal: dict[tuple, torch.Tensor] = {}

    def only_causal(self, evicted: tuple | None) -> bool:
        """Whether each query sees all keys up to its own."""
        return self.given is None and self.padding is None and evicted is None

    def for_layer(self, query: torch.Tensor, kv_len: int, evicted: tuple | None) -> torch.Tensor | None:
        if self.given is not None and evicted is None:
            return self.given
        if self.padding is not None and self.padding.shape[-1] != kv_len:
            raise ValueError(
                f"attention_mask marks padding among {self.padding.shape[-1]} tokens, but this layer holds {kv_len} "
                "keys: after compression nobody knows which were padding. Use prompts of equal length, or one by one."
            )
        if self.implementation.startswith("flash"):
            return self.padding  # the kernel is causal by itself, aligned to the last key
        q_len = query.shape[2]
        kernel_is_causal = self.implementation != "eager" and q_len == kv_len
        if self.padding is None and evicted is None:
            if q_len == 1 or kernel_is_causal:
                return None
            return self._causal(q_len, kv_len, query.device, query.dtype if self.implementation == "eager" else None)
        mask = self._causal(q_len, kv_len, query.device) if q_len > 1 else None
        if self.padding is not None:
            # A padding query still sees itself: a row without any key would be NaN and poison its value.
            itself = torch.eye(q_len, kv_len, dtype=torch.bool, device=query.device)
            itself = itself.roll(kv_len - q_len, dims=1)
            keep = self.padding[:, None, None].to(query.device)
            mask = keep | itself if mask is None else (mask & keep) | itself
        if evicted is not None:
            keep = query.new_ones(query.shape[0], query.shape[1], kv_len, dtype=torch.bool)
            keep[tuple(index.to(query.device) for index in evicted)] = False
            mask = keep[:, :, None] if mask is None else mask & keep[:, :, None]  # (batch, heads, 1 or q_len, kv_len)
            if self.given is not None:
                mask = (
                    mask & self.given if self.given.dtype == torch.bool else self.given.masked_fill(~mask, -torch.inf)
                )
        return mask

    def _causal(self, q_len: int, kv_len: int, device: torch.device, additive: torch.dtype | None = None):
        """Made once for all layers of these lengths; as a mask to be added, in that dtype, for eager attention."""
        key = (q_len, kv_len, device, additive)
        if key not in self.causal:
            mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)[None, None]
            self.causal[key] = mask if additive is None else as_additive(mask, additive)
        return self.causal[key]


def as_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
