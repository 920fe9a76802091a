"""One press on one piece of text, looked at closely: which tokens survive, and what the model then says. Notebook 06.

All is asked of the functions that the studies use. As there, the token right after the context is predicted by the
prefill, which no press has touched: it is given, and what is compared is what comes after it.
"""

from dataclasses import dataclass

import kvpress
import torch
from transformers import PreTrainedTokenizerBase

from kvneox_lib.inputs.text import Text
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.inputs.windows import part_at, tokenize
from kvneox_lib.measures.decoding import generate
from kvneox_lib.measures.perplexity import score_each
from kvneox_lib.measures.survivors import prefill_and_find
from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, with_model
from kvneox_lib.presses.facts import decoding_part, rerotates

ROTATED = "这种方法把留下的键旋转到了新的位置，与原来的键对不上，所以没有图。"
CHANGED = "这种方法改动了留下的键（例如把一些通道置零），与原来的键对不上，所以没有图。"
ROTATED_AFTERWARDS = "键在取舍之后又旋转到了连续的位置；图是旋转之前的取舍。"
LATER = "这种方法在解码中（继续）压缩；图只到读完上下文为止，那时解码中的淘汰还没有开始。"


@dataclass(frozen=True)
class Reading:
    """What the model makes of the text from a cache, compressed or not."""

    next_token: torch.Tensor  # (vocabulary,) probabilities of the token after the given one
    continuation: list[str]  # greedy, token by token
    nll: float  # nat a token, of the text's own continuation
    kept_fraction: float
    kv_bytes: int
    prefill_s: float
    step_s: float | None  # None where a single token was decoded


@dataclass(frozen=True)
class Exploration:
    context: list[str]  # token by token
    given: str  # the token after the context
    truth: list[str]  # how the text goes on after it
    kept: torch.Tensor | None  # (layers, heads, T) booleans
    remark: str  # in Chinese: what to know about that map, or why there is none
    before: Reading
    after: Reading
    next_tokens: list[tuple[str, float, float]]  # the likeliest of both readings: token, probability before, after

    @property
    def kl_nat(self) -> float:
        """KL(before || after) of the next token."""
        p, q = self.before.next_token.double(), self.after.next_token.double()
        return float(torch.special.xlogy(p, p / q.clamp(min=1e-300)).sum())


@torch.no_grad()
@with_model
def explore(
    model: KVNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    n_context: int,
    press,
    top_k: int = 10,
) -> Exploration:
    """`press` compresses the first `n_context` of `input_ids` (1, T); the others are how the text goes on."""
    input_ids = input_ids.to(model.device)
    kept, remark = _map(model, input_ids[:, :n_context], press)
    before, after = (_read(model, tokenizer, input_ids, n_context, one) for one in (None, press))
    likely = torch.maximum(before.next_token, after.next_token).topk(top_k).indices.tolist()
    shown = zip(likely, before.next_token[likely].tolist(), after.next_token[likely].tolist())
    pieces = token_texts(tokenizer, input_ids[0].tolist())
    return Exploration(
        context=pieces[:n_context],
        given=pieces[n_context],
        truth=pieces[n_context + 1 :],
        kept=kept,
        remark=remark,
        before=before,
        after=after,
        next_tokens=[(tokenizer.decode([token]), p, q) for token, p, q in shown],
    )


def _map(model: KVNeoXForCausalLM, context: torch.Tensor, press) -> tuple[torch.Tensor | None, str]:
    """(layers, heads, T), or None, and what is to be said about it."""
    ((_, kept),) = prefill_and_find(model, context, [press])
    if kept is None:
        return None, ROTATED if rerotates(press) else CHANGED
    if isinstance(press, kvpress.KeyRerotationPress):
        return kept[:, 0], ROTATED_AFTERWARDS
    return kept[:, 0], "" if decoding_part(press) is None else LATER


def _read(model: KVNeoXForCausalLM, tokenizer, input_ids: torch.Tensor, n_context: int, press) -> Reading:
    (scored,) = score_each(model, input_ids, n_context=n_context, presses=[press])
    given = input_ids[:, n_context : n_context + 1]
    made = generate(  # last, when everything is warm: it is timed
        model,
        input_ids[:, :n_context],
        press=press,
        question_ids=given,
        max_new_tokens=input_ids.shape[1] - n_context - 1,
        with_logits=True,
    )
    n_steps = made.tokens.shape[1] - 1
    return Reading(
        next_token=made.logits[0, 0].float().softmax(-1).cpu(),
        continuation=token_texts(tokenizer, made.tokens[0].tolist()),
        nll=float(scored.nll.double().mean()),
        kept_fraction=float(scored.kept.double().mean()) / n_context,
        kv_bytes=scored.kv_bytes,
        prefill_s=made.prefill_s,
        step_s=made.decode_s / n_steps if n_steps else None,
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token. One that ends inside a character reads "·"; the character is with its last token."""
    texts, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if text.endswith("\ufffd") and len(waiting) < 4:  # a character has at most four bytes
            texts.append("·")
        else:
            texts.append(text)
            waiting = []
    return texts


def excerpt(
    text: Text, loaded: LoadedModel, *, position: float, context_length: int, continuation_length: int
) -> tuple[torch.Tensor, int]:
    """Token ids (1, T) of the first document from `position` (0 its beginning, 1 its end) on, and how many of them are
    context: less than asked for in a short document, or where the model was trained on less."""
    check_int("context_length", context_length, 1)
    check_int("continuation_length", continuation_length, 2)
    if isinstance(position, bool) or not isinstance(position, int | float) or not 0 <= position <= 1:
        raise ValueError(f"position={position!r}: must be from 0 (the beginning of the text) to 1 (its end)")
    part, position = part_at(text.documents[0], position)
    ids = tokenize(part, loaded.tokenizer).ids
    longest = min(len(ids), loaded.model.config.max_position_embeddings) - continuation_length
    if longest < 1:
        raise ValueError(
            f"continuation_length={continuation_length}: leaves no context; text or model have just "
            f"{longest + continuation_length} tokens"
        )
    n_context = min(context_length, longest)
    n_tokens = n_context + continuation_length
    start = round(position * (len(ids) - n_tokens))
    return torch.from_numpy(ids[start : start + n_tokens].astype("int64"))[None], n_context
