"""What a multiple-choice question costs: four choices after a shared context of 1,000 tokens, in plain forward passes
over context and choices, with logits for the choices alone: no token is read twice. Interleaved in one run; beside it
the harness' own model, which reads the context with each choice.

    python benchmarks/tasks.py
"""

import logging
import statistics
import time
from functools import partial

import torch
from lm_eval.models.huggingface import HFLM

from kvneox_lib import load_model
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.tasks import KVNeoXLM
from kvneox_lib.neox.modeling import stock_twin

REPEATS, CONTEXT, CHOICES, RATIO, WANTED = 5, 1000, 4, 0.5, 1.5
LENGTHS = 4, 16  # of a choice
PRESSES = "no_press", "snapkv", "adakv_snapkv"
MODELS = {"demo": "auto", "pythia-70m": "random"}  # time does not depend on the values of weights


def requests_of(vocabulary: int, choice: int) -> list[tuple[None, list[int], list[int]]]:
    """As the harness hands on what is tokenized: nothing to name it by, the prompt, a continuation."""
    ids = torch.randint(2, vocabulary, (CONTEXT + CHOICES * choice,)).tolist()
    return [(None, ids[:CONTEXT], ids[CONTEXT + n * choice :][:choice]) for n in range(CHOICES)]


@torch.no_grad()
def measured(loaded: LoadedModel, choice: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    model, stock = loaded.model, stock_twin(loaded.model, "sdpa")
    requests = requests_of(model.config.vocab_size, choice)
    hf = HFLM(pretrained=stock, tokenizer=loaded.tokenizer, batch_size=CHOICES, device="cpu")
    whole = torch.tensor([requests[0][1] + sum((tokens for *_, tokens in requests), [])])
    with_press = partial(KVNeoXLM, loaded.model, tokenizer=loaded.tokenizer, compression_ratio=RATIO)
    answering = {press: with_press(press=press) for press in PRESSES} | {"harness": hf}
    variants = {who: partial(lm._loglikelihood_tokens, requests, disable_tqdm=True) for who, lm in answering.items()}
    variants["one pass"] = partial(model, whole, logits_to_keep=CHOICES * choice)
    times = {variant: [] for variant in variants}
    for repeat in range(REPEATS + 1):
        for variant, run in variants.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                times[variant].append(time.perf_counter() - start)
    return times


def main() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(f"float32, {CHOICES} choices after {CONTEXT} tokens, {torch.get_num_threads()} thread(s); ratio {RATIO}")
    for name, weights in MODELS.items():
        loaded = load_model(name, weights=weights, dtype="float32")
        for choice in LENGTHS:
            times = measured(loaded, choice)
            passes = times.pop("one pass")
            print(f"{name}, choices of {choice}: one pass {statistics.median(passes):.3f} s; wanted at most {WANTED}")
            for who, seconds in times.items():
                ratios = sorted(one / a_pass for one, a_pass in zip(seconds, passes))
                print(f"  {who:14}{statistics.median(ratios):5.2f} times  (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
