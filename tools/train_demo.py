"""Train a model like the bundled demo: text files in, a folder with a small GPT-NeoX and its tokenizer out.

    python tools/train_demo.py novels/ manuals/ --held-out unseen.txt --output my-demo

The model is a GPT-NeoX of 6 layers, hidden size 256, 4 heads, a quarter of each head rotary, embeddings tied, with a
byte-level BPE of 8,192 tokens that is trained on the text, or taken from a folder. It is trained in bfloat16 autocast:
Muon (learning rate 0.02, momentum 0.95) for the matrices of the layers, AdamW (0.002) for all else, both decaying
linearly to zero; documents are joined with <|endoftext|>. First come plain windows of 1,024 tokens, which are cheap and
teach the language; then windows of 2,048, which teach to read the cache: in some a passage of 48 to 256 tokens comes
back at a later place, in some numbers are told and at the end asked for. RECIPES has two: that of the bundled model
(49 M tokens; hours on two cores), and demo-wordings, which hears of numbers in several wordings and more of them in a
window (164 M tokens; minutes on a GPU), of which no weights are bundled.

The windows of a step follow from the seed and the step alone. So a run that is interrupted goes on from its last
checkpoint, with the same command, as if nothing had happened. Weights are saved in float16, those of the steps that
`--keep` names in folders of their own; train.json says what was done, the loss of every step, and how the model does on
the held-out texts.
"""

import argparse
import copy
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kvneox_lib.inputs.templates import DEMO, WORDINGS, Template, trained_wordings, with_other_nouns

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
PASSAGE = (48, 256)  # tokens that come back


@dataclass(frozen=True)
class Stage:
    tokens: int
    window: int
    returning: float = 0.0  # share of the windows in which a passage comes back
    numbers: float = 0.0  # share of those in which numbers are told
    wordings: tuple[Template, ...] = ()
    anew: float | None = None  # share of the learning rates with which they, and the optimizers, begin anew


@dataclass(frozen=True)
class Recipe:
    batch_tokens: int
    told: tuple[int, int]  # numbers in a window
    asked: tuple[int, int]
    stages: tuple[Stage, ...]


_SEVERAL = tuple(trained_wordings(WORDINGS))
RECIPES = {
    DEMO: Recipe(
        batch_tokens=8192,
        told=(2, 8),
        asked=(1, 1),
        stages=(Stage(16_000_000, 1024), Stage(33_000_000, 2048, 0.2, 0.2, tuple(trained_wordings(DEMO)))),
    ),
    WORDINGS: Recipe(
        batch_tokens=32_768,
        told=(2, 24),
        asked=(1, 4),
        stages=(
            Stage(26_214_400, 1024),
            Stage(78_643_200, 2048, 0.2, 0.2, _SEVERAL),
            Stage(58_982_400, 2048, 0.1, 0.5, (*_SEVERAL, *with_other_nouns()), anew=0.4),
        ),
    ),
}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 files, or folders of .txt and .md files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out", nargs="*", type=Path, default=[], help="text to evaluate on, not trained on")
    parser.add_argument("--recipe", choices=RECIPES, default=DEMO)
    parser.add_argument("--windows", nargs="+", type=int, help="of the stages, in the place of the recipe's")
    parser.add_argument("--tokens", nargs="+", type=int, help="of the stages, in the place of the recipe's")
    parser.add_argument("--batch-tokens", type=int, help="in the place of the recipe's")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokenizer", type=Path, help="a folder with one to use; default: train one on the texts")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=0.002)
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    parser.add_argument("--keep", nargs="*", type=int, default=[], help="steps whose weights are kept, in step<n>/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    recipe = RECIPES[chosen.recipe]
    chosen.windows = chosen.windows or [stage.window for stage in recipe.stages]
    chosen.tokens = chosen.tokens or [stage.tokens for stage in recipe.stages]
    chosen.batch_tokens = chosen.batch_tokens or recipe.batch_tokens
    for name, values in (("--windows", chosen.windows), ("--tokens", chosen.tokens)):
        if len(values) != len(recipe.stages):
            parser.error(f"{name} {values}: the recipe {chosen.recipe} has {len(recipe.stages)} stages")
    if chosen.batch_tokens < max(chosen.windows):
        parser.error(f"--batch-tokens {chosen.batch_tokens} holds no window of {max(chosen.windows)}")
    return chosen


# ---- text to tokens ----


def read_texts(paths: list[Path]) -> list[str]:
    files = []
    for path in paths:
        found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
        if not found:
            raise ValueError(f"{path}: no such file, and no folder with .txt or .md files")
        files += found
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}); convert it: iconv -t UTF-8") from error
    return texts


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],  # ids 0 and 1
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded, seen or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, pad_token=PADDING)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)


def encode(tokenizer, texts: list[str], at_least: int) -> np.ndarray:
    """All texts as one row of token ids (n,), each text ended by <|endoftext|>."""
    pieces = tokenizer(texts, verbose=False).input_ids  # all at once: in parallel
    tokens = np.concatenate([np.array(piece + [tokenizer.eos_token_id], dtype=np.uint16) for piece in pieces])
    if len(tokens) <= at_least:
        raise ValueError(f"the texts have {len(tokens):,} tokens; a window needs more than {at_least:,}")
    return tokens


# ---- windows ----


def plain_window(tokens: np.ndarray, length: int, rng: random.Random) -> list[int]:
    start = rng.randrange(len(tokens) - length)
    return tokens[start : start + length].tolist()


def with_returning_passage(window: list[int], rng: random.Random) -> list[int]:
    """Overwrite a later place with an earlier passage: only who looks back can predict it."""
    shortest, longest = (min(length, len(window) // 4) for length in PASSAGE)
    n = rng.randint(shortest, longest)
    source = rng.randint(0, len(window) - 2 * n)
    target = rng.randint(source + n, len(window) - n)
    return window[:target] + window[source : source + n] + window[target + n :]


def made_up_name(rng: random.Random) -> str:
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return ("".join(syllables) + rng.choice(["", "", "l", "n", "r", "t"])).capitalize()


def with_numbers(
    window: list[int], tokenizer, recipe: Recipe, stage: Stage, rng: random.Random
) -> tuple[list[int], list[slice]]:
    """Numbers are told at random places, each in one of the wordings, and some are asked for at the end; also where the
    answers are."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    names = list(dict.fromkeys(made_up_name(rng) for _ in range(rng.randint(*recipe.told))))
    told = [(name, f"{rng.randrange(100_000):05}", rng.choice(stage.wordings)) for name in names]
    statements, ending, answers, room = [], [], [], len(window) // 2  # a short window gets fewer, at most half of it
    n_asked = min(rng.randint(*recipe.asked), len(told))
    for i, (name, digits, wording) in enumerate(told):
        statement = ids("".join(wording.told(name, digits)))
        question, answer = (ids(wording.asked(name)), ids(f" {digits}.")) if i < n_asked else ([], [])
        needed = len(statement) + len(question) + len(answer)
        if statements and needed > room:
            continue
        statements.append(statement)
        room -= needed
        if answer:
            ending += question + answer
            answers.append((len(ending) - len(answer), len(ending)))
    filler = window[: max(len(window) - len(ending) - sum(map(len, statements)), 0)]

    rng.shuffle(statements)
    places = sorted(rng.randint(0, len(filler)) for _ in statements)
    mixed, done = [], 0
    for place, statement in zip(places, statements):
        mixed += filler[done:place] + statement
        done = place
    mixed += filler[done:]
    before = len(mixed)
    mixed += ending
    if len(mixed) != len(window):
        raise ValueError(f"a window of {len(window)} tokens is too short for a number and its question ({len(mixed)})")
    return mixed, [slice(before + start, before + end) for start, end in answers]


def batch(tokens: np.ndarray, tokenizer, number: int, step: int, chosen: argparse.Namespace) -> torch.Tensor:
    """The windows (rows, length) of a step. They follow from seed, stage and step, so nothing of this is saved."""
    rng, recipe = random.Random(f"{chosen.seed}/{number}/{step}"), RECIPES[chosen.recipe]
    length, stage, rows = chosen.windows[number], recipe.stages[number], []
    for _ in range(chosen.batch_tokens // length):
        window, kind = plain_window(tokens, length, rng), rng.random()
        if kind < stage.returning:
            window = with_returning_passage(window, rng)
        elif kind < stage.returning + stage.numbers:
            window, _ = with_numbers(window, tokenizer, recipe, stage, rng)
        rows.append(window)
    return torch.tensor(rows, device=chosen.device)


# ---- training ----


def new_model(chosen: argparse.Namespace, vocabulary: int) -> GPTNeoXForCausalLM:
    torch.manual_seed(chosen.seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=chosen.hidden,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        intermediate_size=4 * chosen.hidden,
        max_position_embeddings=max(chosen.windows),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return GPTNeoXForCausalLM(config).to(chosen.device)


def new_optimizers(model: GPTNeoXForCausalLM, chosen: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon orthogonalizes the update of a matrix; embeddings, biases and norms are no such matrices."""
    matrices = [parameter for parameter in model.gpt_neox.layers.parameters() if parameter.dim() == 2]
    of_layers = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in of_layers]
    return [
        torch.optim.Muon(matrices, lr=chosen.muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=chosen.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model, tokenizer, tokens: np.ndarray, chosen: argparse.Namespace, checkpoint: Path) -> list[list[float]]:
    """All steps that the checkpoint does not hold yet; returns [step, loss] of every step."""
    optimizers = new_optimizers(model, chosen)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    rates = learning_rates(chosen)
    stages = [number for number, of_stage in enumerate(rates) for _ in of_stage]
    rates = [rate for of_stage in rates for rate in of_stage]
    log = load_checkpoint(checkpoint, model, optimizers, chosen)
    start = time.perf_counter()
    for step in range(len(log), len(stages)):
        if step == stages.index(stages[step]) and RECIPES[chosen.recipe].stages[stages[step]].anew:
            optimizers = new_optimizers(model, chosen)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * rates[step]
        ids = batch(tokens, tokenizer, stages[step], step, chosen)
        with torch.autocast(torch.device(chosen.device).type, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.append([step, round(loss.item(), 4)])
        if (step + 1) % chosen.checkpoint_every == 0 or step + 1 == len(stages):
            save_checkpoint(checkpoint, model, optimizers, log, chosen)
            print(f"step {step + 1}/{len(stages)}  loss {loss:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
        if step + 1 in chosen.keep:
            save_weights(model, tokenizer, chosen.output / f"step{step + 1}")
    return log


def learning_rates(chosen: argparse.Namespace) -> list[list[float]]:
    """Of each step of each stage, as a share of the peak: linearly to zero, and again where a stage begins anew."""
    stages = RECIPES[chosen.recipe].stages
    lengths = [tokens // chosen.batch_tokens for tokens in chosen.tokens]
    starts = [number for number, stage in enumerate(stages) if number == 0 or stage.anew] + [len(stages)]
    rates = []
    for first, end in zip(starts, starts[1:]):
        total, peak, done = sum(lengths[first:end]), stages[first].anew or 1.0, 0
        for length in lengths[first:end]:
            rates.append([peak * (1 - step / total) for step in range(done, done + length)])
            done += length
    return rates


def save_weights(model, tokenizer, folder: Path) -> None:
    """In float16, while the model goes on in float32."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(chosen: argparse.Namespace) -> dict:
    """What a run must have in common with a checkpoint to go on from it."""
    free = ("output", "checkpoint_every", "keep", "device", "held_out", "tokenizer")
    kept = {name: value for name, value in vars(chosen).items() if name not in free}
    return {**kept, "texts": [path.name for path in chosen.texts]}


def save_checkpoint(path: Path, model, optimizers, log, chosen: argparse.Namespace):
    state = {"model": model.state_dict(), "log": log, "settings": settings(chosen)}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # whole or not at all


def load_checkpoint(path: Path, model, optimizers, chosen: argparse.Namespace) -> list[list[float]]:
    if not path.exists():
        return []
    state = torch.load(path, map_location=chosen.device, weights_only=True)
    if state["settings"] != settings(chosen):
        raise ValueError(f"{path} is of a run with other settings: {state['settings']}. Remove it, or go on with those")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    print(f"going on from step {len(state['log'])} of {path}", flush=True)
    return state["log"]


# ---- evaluation ----


@torch.no_grad()
def evaluate(model, tokenizer, tokens: np.ndarray, chosen: argparse.Namespace, most: int = 32) -> dict:
    """Perplexity of plain windows, and the share of the answers' tokens that are predicted right."""
    length, recipe = chosen.windows[-1], RECIPES[chosen.recipe]
    nll, right, rng = [], [], random.Random(chosen.seed)
    for start in range(0, min(len(tokens) - length, most * length), length):
        window = tokens[start : start + length].tolist()
        ids = torch.tensor([window], device=chosen.device)
        nll.append(model(ids, labels=ids).loss.item())
        window, answers = with_numbers(window, tokenizer, recipe, recipe.stages[-1], rng)
        ids = torch.tensor([window], device=chosen.device)
        hit = model(ids).logits[0, :-1].argmax(-1) == ids[0, 1:]
        right += [token for answer in answers for token in hit[answer.start - 1 : answer.stop - 1].tolist()]
    scores = {"perplexity": np.exp(np.mean(nll)).item(), "answer_tokens_right": np.mean(right).item()}
    return {"windows": len(nll), **scores}


def main(arguments: list[str] | None = None):
    chosen = options(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    checkpoint = chosen.output / "checkpoint.pt"
    texts = read_texts(chosen.texts)
    if checkpoint.exists():
        tokenizer = AutoTokenizer.from_pretrained(chosen.output, local_files_only=True)
    else:
        given = chosen.tokenizer and AutoTokenizer.from_pretrained(chosen.tokenizer, local_files_only=True)
        tokenizer = given or train_tokenizer(texts, chosen.vocabulary, max(chosen.windows))
        tokenizer.save_pretrained(chosen.output)
    tokens = encode(tokenizer, texts, at_least=max(chosen.windows))
    model = new_model(chosen, len(tokenizer))
    print(f"{len(tokens):,} tokens of text, {model.num_parameters():,} parameters, on {chosen.device}", flush=True)

    log = train(model, tokenizer, tokens, chosen, checkpoint)
    model.eval()
    record = {**settings(chosen), "unique_tokens": len(tokens)}
    record["evaluation"] = {
        path.name: evaluate(model, tokenizer, encode(tokenizer, read_texts([path]), chosen.windows[-1]), chosen)
        for path in chosen.held_out
    }
    save_weights(model, tokenizer, chosen.output)
    (chosen.output / "train.json").write_text(json.dumps({**record, "log": log}))
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
