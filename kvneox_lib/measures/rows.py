"""The rows of a batch as what they are, texts of their own length: without padding, each with its question."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from kvneox_lib.neox.checks import check_ids
from kvneox_lib.presses.facts import rows_independent


def without_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows (n_i,) of `input_ids` (batch, T), whose padding, marked by zeros in the mask, is on the left."""
    if attention_mask is None:
        return list(input_ids)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; must be a tensor, 0 where padding is")
    if attention_mask.shape != input_ids.shape:
        given, allowed = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise ValueError(f"attention_mask has shape {given}; must be {allowed}, as input_ids has")
    strange = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if len(strange):
        raise ValueError(f"attention_mask holds {strange[0].item()}; must be 0 or 1, or bool")
    seen = attention_mask.bool().cpu()
    for row, mask in enumerate(seen):
        if not mask[-1] or (mask[:-1] & ~mask[1:]).any():
            what = "is all padding" if not mask.any() else "has padding after text"
            raise ValueError(
                f"attention_mask: row {row} {what}; must be zeros, if any, then ones: prompts are padded on the left "
                "(a tokenizer does so with padding_side='left')"
            )
    return [ids[-n:] for ids, n in zip(input_ids, seen.sum(1).tolist())]


def check_questions(
    question_ids: torch.Tensor | Sequence[torch.Tensor] | None, model, prompts: list[torch.Tensor]
) -> list[torch.Tensor]:
    """A question (n_i,) for each prompt, from (batch, n) or a list of (n_i,) or (1, n_i); empty if none is asked."""
    if question_ids is None:
        return [prompt[:0] for prompt in prompts]
    if not isinstance(question_ids, (list, tuple)):
        return list(check_ids("question_ids", question_ids, model, rows=len(prompts)))
    if len(question_ids) != len(prompts):
        raise ValueError(f"question_ids has {len(question_ids)} questions; must be one for each of {len(prompts)} rows")
    questions = []
    for row, ids in enumerate(question_ids):
        name = f"question_ids[{row}]"
        flat = ids[None] if isinstance(ids, torch.Tensor) and ids.dim() == 1 else ids
        if isinstance(flat, torch.Tensor) and (flat.dim() != 2 or len(flat) != 1):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; must be (n,) or (1, n)")
        questions.append(check_ids(name, flat, model)[0])
    return questions


def readable_together(prompts: list[torch.Tensor], questions: list[torch.Tensor], press) -> list[list[int]]:
    """The rows in groups of equal length; each row by itself where the press would mix them.

    The shortest come first: a context that is too short for the press is then refused before any work.
    """
    groups = defaultdict(list)
    for row, (prompt, question) in enumerate(zip(prompts, questions)):
        lengths = len(prompt), len(question)
        groups[lengths if rows_independent(press) else (*lengths, row)].append(row)
    return [groups[key] for key in sorted(groups)]
