"""The proof: our model against the stock one, every press against an independent computation.

    python -m kvneox_lib verify [--model demo] [--smoke]

Each check returns a `Check` with the figure it measured and the limit it had to keep; tests, notebook 00 and the
command line share them. Stock figures come from transformers' own `GPTNeoXForCausalLM` with the same weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, GPTNeoXForCausalLM, pipeline

from kvneox_lib.inputs.weights import load_model
from kvneox_lib.measures.decoding import Generation, generate
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.neox.hooks import hooked
from kvneox_lib.neox.masks import as_additive
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, half_split, stock_twin
from kvneox_lib.presses.applying import applied, attention, check_press
from kvneox_lib.presses.by_name import make_press, press_row, ratio_for
from kvneox_lib.presses.calibration import standard_library_docstrings
from kvneox_lib.presses.facts import acts, decoding_part
from kvneox_lib.presses.registry import REGISTRY

POSITIONS_CHECKED = ("snapkv", "tova", "knorm", "observed_attention", "streaming_llm", "pyramidkv")
MODES = ("pipeline", "generation", "two questions")


@dataclass(frozen=True)
class Check:
    name: str
    figure: float
    limit: float
    at_least: bool = False  # the figure must be above the limit instead of below it

    @property
    def passed(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.figure:.3g} ({sign} {self.limit:g})"


def _relative(ours: torch.Tensor, stock: torch.Tensor) -> float:
    return float((ours.float() - stock.float()).abs().max() / stock.float().abs().max())


def _limit(model: KVNeoXForCausalLM) -> float:
    return 1e-5 if model.dtype == torch.float32 else 2e-2


# -- the model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_logits(model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> Check:
    stock = stock_twin(model, model.config._attn_implementation)
    difference = _relative(model(input_ids).logits, stock(input_ids).logits)
    return Check("logits, relative difference to stock", difference, _limit(model))


@torch.no_grad()
def check_projections(model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> list[Check]:
    """q, k, v as kvpress gets them against those that a hook finds inside the stock attention; the same cut wrongly."""
    stock, heads, dim = stock_twin(model), model.config.num_attention_heads, model.config.head_dim
    inside, worst, contiguous = [], 0.0, float("inf")

    def note(module, args, kwargs, output):
        inside.append((args[0], output))

    with hooked([layer.attention.query_key_value for layer in stock.gpt_neox.layers], note):
        stock(input_ids)
    for layer, (hidden, fused) in zip(model.model.layers, inside):
        ours = layer.self_attn
        per_head = fused.unflatten(-1, (heads, 3, dim)).unbind(-2)  # each (batch, T, heads, D)
        for project, true in zip((ours.q_proj, ours.k_proj, ours.v_proj), per_head):
            in_cache_order = true if project.part == 2 else half_split(true, ours.rotary_ndims)
            worst = max(worst, _relative(project(hidden), in_cache_order.flatten(2)))
        wrong = fused[..., : heads * dim].unflatten(-1, (heads, dim))
        contiguous = min(contiguous, _relative(wrong, per_head[0]))
    return [
        Check("q, k, v, relative difference to those inside the stock attention", worst, _limit(model)),
        Check("q cut as a contiguous block, relative difference (must be wrong)", contiguous, 0.1, at_least=True),
    ]


@torch.no_grad()
def check_cached_keys(model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> Check:
    ours, stock = DynamicCache(), DynamicCache()
    model(input_ids, past_key_values=ours)
    stock_twin(model)(input_ids, past_key_values=stock)
    pairs = zip(ours.layers, stock.layers)
    ndims = model.model.layers[0].self_attn.rotary_ndims
    worst = max(_relative(one.keys, half_split(other.keys, ndims)) for one, other in pairs)
    return Check("rotated keys in the cache, relative difference to stock's reordered", worst, _limit(model))


# -- which positions a press keeps -----------------------------------------------------------------------------------


@torch.no_grad()
def independent_scores(name: str, stock: GPTNeoXForCausalLM, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """A layer's scores (batch, heads, T) from the stock model's own attention probabilities and keys, by the papers."""
    cache = DynamicCache()
    probabilities = stock(input_ids, past_key_values=cache, output_attentions=True).attentions
    length, scores = input_ids.shape[1], []
    for attended, held in zip(probabilities, cache.layers):
        attended = attended.double()
        if name in ("snapkv", "pyramidkv"):
            window = make_press(name).window_size
            seen = attended[..., -window:, :-window].mean(-2)
            pooled = F.avg_pool1d(seen, 5, stride=1, padding=2)
            score = F.pad(pooled, (0, window), value=torch.inf)
        elif name == "tova":
            score = F.pad(attended[..., -1, :-1].mean(1, keepdim=True), (0, 1), value=torch.inf).expand_as(
                attended[:, :, 0]
            )
        elif name == "knorm":
            score = -held.keys.double().norm(dim=-1)
        elif name == "observed_attention":
            score = attended.sum(-2) / torch.arange(length, 0, -1, device=attended.device)
        elif name == "streaming_llm":
            recency = torch.arange(length, device=attended.device).double()
            score = recency.masked_fill(recency < 4, torch.inf).expand(*attended.shape[:2], -1)
        else:
            raise ValueError(
                f"press={name!r} has no independent computation here; allowed: {', '.join(POSITIONS_CHECKED)}"
            )
        scores.append(score)
    return scores


def _budgets(name: str, length: int, ratio: float, n_layers: int) -> list[int]:
    """Entries a layer keeps: the same for all, but under PyramidKV falling linearly around the same mean."""
    mean = length * (1 - ratio)
    if name != "pyramidkv":
        return [int(mean)] * n_layers
    press = make_press(name)
    highest = min(2 * mean - mean / press.beta, length - press.window_size)
    lowest = 2 * mean - highest
    return [round(highest - layer * (highest - lowest) / max(n_layers - 1, 1)) for layer in range(n_layers)]


def check_positions(model: KVNeoXForCausalLM, input_ids: torch.Tensor, name: str, ratio: float = 0.5) -> Check:
    """Count the kept positions that differ from the independent computation, on every layer, head and sample."""
    implementation = "eager" if name == "observed_attention" else model.config._attn_implementation
    with attention(model, implementation):
        kept = kept_positions(model, input_ids, make_press(name, ratio))
    scores = independent_scores(name, stock_twin(model), input_ids)
    wrong = 0
    for mask, score, budget in zip(kept, scores, _budgets(name, input_ids.shape[1], ratio, len(scores))):
        score, cut = score.cpu(), score.cpu().topk(budget, dim=-1).values[..., -1:]
        tie = (score - cut).abs() <= 1e-6 * cut.abs()  # the two computations may round the last place differently
        wrong += int(((mask != (score >= cut)) & ~tie).sum()) + int((mask.sum(-1) != budget).sum())
    return Check(f"{name} at {ratio}: kept positions that differ from the stock model's attention", wrong, 0)


# -- generation after compression ------------------------------------------------------------------------------------


@torch.no_grad()
def masked_stock_logits(model, input_ids: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What the stock model says in one pass when queries after the context cannot see the evicted positions.

    kept (layers, batch, heads, T) for the context of T tokens; a mask per layer and head is put in by a hook.
    """
    stock, sequence = stock_twin(model), torch.cat([input_ids, tokens[:, :-1]], dim=1)
    context, total = kept.shape[-1], sequence.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()

    def put_in(module, args, kwargs):
        keep = kept[module.layer_idx]
        visible = causal.expand(*keep.shape[:2], total, total).clone()
        visible[:, :, context:, :context] &= keep[:, :, None]
        return args, {**kwargs, "attention_mask": as_additive(visible, model.dtype).to(model.device)}

    with hooked([layer.attention for layer in stock.gpt_neox.layers], put_in, before=True):
        return stock(sequence).logits[:, context:]


def answer(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, n_new: int) -> Generation:
    """Greedy, and never ending early. The last token of the prompt is read after compression, so that all logits have
    seen the compressed cache."""
    return generate(
        model,
        input_ids[:, :-1],
        press=press,
        question_ids=input_ids[:, -1:],
        max_new_tokens=n_new,
        stop_at_eos=False,
        with_logits=True,
    )


@torch.no_grad()
def check_generation(
    model: KVNeoXForCausalLM, input_ids: torch.Tensor, name: str, ratio=0.5, n_new: int = 12
) -> list[Check]:
    """Token by token after evicted entries were given back, and in one pass where they are masked."""
    context, length = input_ids[:, :-1], input_ids.shape[1] - 1
    made = answer(model, input_ids, make_press(name, ratio), n_new)
    kept = kept_positions(model, context, make_press(name, ratio))
    expected = masked_stock_logits(model, input_ids, made.tokens, kept)
    unlike = float((expected.argmax(-1) != made.tokens).sum())
    read = torch.cat([input_ids[:, -1:], made.tokens[:, :-1]], dim=1)
    positions = torch.arange(length, length + n_new, device=read.device)[None]
    cache = prefill(model, context, make_press(name, ratio))
    masked = model(read, past_key_values=cache, position_ids=positions).logits
    return [
        Check(
            f"generation under {name}: logits, relative difference to stock with masked positions",
            max(_relative(made.logits, expected), _relative(masked, expected)),
            1e-4,
        ),
        Check(f"generation under {name}: tokens that differ", unlike, 0),
    ]


def check_breaking(model: KVNeoXForCausalLM, input_ids: torch.Tensor, name: str = "knorm") -> Check:
    """Keep 1 %: the next logits must move by far more than any numerical error, or the press does nothing."""
    full, starved = (answer(model, input_ids, press, 1).logits for press in (None, make_press(name, 0.99)))
    return Check(
        f"{name} keeping 1 %: logits move, in units of 1e-5", _relative(starved, full) / 1e-5, 1000, at_least=True
    )


def check_hooks_gone(model: KVNeoXForCausalLM, input_ids: torch.Tensor, name: str = "snapkv") -> Check:
    """Hooks left on the attention after the context manager, once after a good run and once after a failure inside."""

    def count() -> int:
        return sum(len(layer.self_attn._forward_hooks) for layer in model.model.layers)

    before = count()
    with make_press(name)(model):
        model(input_ids)
    left = count() - before
    try:
        with applied(make_press(name), model):
            raise KeyError("on purpose")
    except KeyError:
        left += count() - before
    return Check("hooks left behind", left, 0)


# -- every press, every way of using it ------------------------------------------------------------------------------


def run_cell(model: KVNeoXForCausalLM, tokenizer, name: str, implementation: str, mode: str, context: str) -> str:
    """What comes of it: ok, or "refused: ..." with the stated reason. Anything else raises."""
    # Decoding presses get a target below the context and enough steps to act.
    options = {"target_size": 128} if "target_size" in press_row(name).defaults else {}
    press = make_press(name, ratio_for(name, 0.5, model), **options)
    n_new = 3 if decoding_part(press) is None else 36
    with attention(model, implementation):
        try:
            check_press(press, model)
            if mode == "generation":
                ids = tokenizer(context, return_tensors="pt").input_ids.to(model.device)
                answer(model, ids, press, n_new)
                return "ok"
            if name == "finch":
                # FINCH scores by a question inside the context, behind a delimiter of the tokenizer's own
                press.delimiter_token_id = tokenizer.convert_tokens_to_ids("<|padding|>")
                context += "<|padding|>" + context[-200:]
            questions = ["What is it?", "And then?"][: 2 if mode == "two questions" else 1]
            pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
            answers = pipe(context, questions=questions, press=press, max_new_tokens=n_new)["answers"]
            assert len(answers) == len(questions)
            return "ok"
        except (ValueError, AssertionError) as refusal:  # kvpress states many of its limits by assertion
            if not str(refusal):
                raise
            return f"refused: {' '.join(str(refusal).split())}"


def press_matrix(model, tokenizer, context: str, names: list[str] | None = None) -> Iterator[dict]:
    """A row a press: name, when it acts, and a cell for each attention implementation and mode."""
    for name in names or list(REGISTRY):
        row = {"press": name, "acts": acts(make_press(name, ratio_for(name, 0.5, model)))}
        for implementation in ("eager", "sdpa"):
            for mode in MODES:
                row[f"{implementation} {mode}"] = run_cell(model, tokenizer, name, implementation, mode, context)
        yield row


# -- all of it -------------------------------------------------------------------------------------------------------


def run_checks(model: KVNeoXForCausalLM, input_ids: torch.Tensor) -> Iterator[Check]:
    """All checks in float32. Lower precision decides near ties otherwise: then only those that can be told apart."""
    yield check_logits(model, input_ids)
    yield from check_projections(model, input_ids)
    yield check_cached_keys(model, input_ids)
    if model.dtype == torch.float32:
        for name in POSITIONS_CHECKED:
            yield check_positions(model, input_ids, name)
        for name in ("streaming_llm", "adakv_snapkv"):
            with attention(model, "sdpa"):  # eager attention cannot serve adakv
                yield from check_generation(model, input_ids, name)
    yield check_breaking(model, input_ids)
    yield check_hooks_gone(model, input_ids)


def verify(model_name: str = "demo", context_length: int = 400, smoke: bool = False) -> int:
    """Print all checks, then what comes of every press; 0 if all passed. smoke: 192 tokens, and no table of presses."""
    loaded = load_model(model_name, attn_implementation="sdpa", dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    length = 192 if smoke else context_length
    ids = tokenizer(standard_library_docstrings(), return_tensors="pt", verbose=False).input_ids
    input_ids = ids[:, : 2 * length].view(2, length).to(model.device)
    print(f"{loaded.name}, {loaded.weights} weights from {loaded.source}; 2 x {length} tokens; {model.device}")

    failed = 0
    for check in run_checks(model, input_ids):
        print(check, flush=True)
        failed += not check.passed
    if smoke:
        tokens = answer(model, input_ids[:1], make_press("knorm", 0.5), 12).tokens
        print("continuation under knorm 0.5:", repr(tokenizer.decode(tokens[0])))
    else:
        print("\npress, when it acts, then eager and sdpa, each: " + ", ".join(MODES))
        for row in press_matrix(model, tokenizer, tokenizer.decode(input_ids[0])):
            print(_matrix_line(row), flush=True)
    print("VERDICT:", f"{failed} checks FAILED" if failed else "all checks passed")
    return 1 if failed else 0


def _matrix_line(row: dict) -> str:
    cells = [row[f"{implementation} {mode}"] for implementation in ("eager", "sdpa") for mode in MODES]
    reasons = sorted({cell for cell in cells if cell != "ok"})
    marks = " ".join("ok" if cell == "ok" else "--" for cell in cells)
    return f"{row['press']:36}{row['acts']:10}{marks}  {' | '.join(reasons)}"
