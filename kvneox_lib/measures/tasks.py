"""lm-evaluation-harness under a press: does the model still answer when its cache is compressed?

The harness reads context and continuation in one pass, which no press can move. Here the context is read under the
press, and the rest of the prompt and the continuation after compression, at their true positions. `questions` says
where a context ends, `answers` does the reading; this module is what the harness talks to.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvneox_lib.inputs.weights import LoadedModel, load_model
from kvneox_lib.measures.answers import (
    Compressed,
    Prompt,
    compressed_each,
    continuations,
    is_long_enough,
    likelihoods,
    shortened,
)
from kvneox_lib.measures.prefill import check_kv_bits
from kvneox_lib.measures.questions import INSIDE, NO_RULE, Form, end_of_context, form_of
from kvneox_lib.measures.scores import Reading, summary
from kvneox_lib.neox.checks import check_choice, check_int
from kvneox_lib.neox.modeling import adapt
from kvneox_lib.presses.applying import attention, check_press
from kvneox_lib.presses.by_name import HALF, make_press, press_row, ratio_for
from kvneox_lib.presses.facts import attention_needed, decoding_part, keep_tokens_of

MAX_GEN_TOKS = 256  # where a task does not say; the harness' own default
DECODING_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature")


@register_model("kvneox")
class KVNeoXLM(TemplateLM):
    """A GPT-NeoX model under a press, for lm-evaluation-harness.

    pretrained: what `load_model` takes, a LoadedModel, or a model, then with its `tokenizer`. press: a name or a press.
    question: "outside", the press sees only the context; "inside", all of a prompt but its last token. cut: how a
    prompt that is too long is shortened, from the "left" as the harness does or in the "middle" as LongBench does.
    batch_size: how many prompts are decoded together. seed: of presses that draw. press_options: the press' own fields.
    """

    def __init__(
        self,
        pretrained,
        *,
        press=None,
        compression_ratio: float = HALF,
        keep_tokens: int | None = None,
        question: str = "outside",
        batch_size: int | str = 1,
        max_length: int | None = None,
        cut: str = "left",
        tokenizer=None,
        weights: str = "pretrained",
        attn_implementation: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        max_batch_size: int | None = None,
        seed: int = 0,
        kv_bits: int | None = None,
        **press_options,
    ):
        super().__init__()
        check_choice("question", question, ("outside", "inside"))
        check_choice("cut", cut, ("left", "middle"))
        if isinstance(press, str):
            press_row(press)  # before weights are loaded
        self.batch_size = _batch_size(batch_size)
        if weights == "random" or getattr(pretrained, "weights", None) == "random":
            raise ValueError("weights='random': random weights answer nothing; allowed is pretrained or auto")
        how = dict(weights=weights, attn_implementation=attn_implementation, dtype=dtype, revision=revision)
        self.loaded = _loaded(pretrained, tokenizer, how | {"device": device or "auto"})
        self.model, self.tokenizer = adapt(self.loaded.model), self.loaded.tokenizer
        trained = self.model.config.max_position_embeddings
        self.max_length = trained if max_length is None else max_length
        check_int("max_length", self.max_length, 2)
        if self.max_length > trained:
            raise ValueError(f"max_length={max_length!r}: allowed is at most {trained}, the trained length")
        press_options |= {} if keep_tokens is None else {"keep_tokens": keep_tokens}
        self.press_name, press = _named_press(press, compression_ratio, self.model, press_options)
        self.keep_tokens = keep_tokens_of(press)
        self.compression_ratio = _ratio_of(press) if self.keep_tokens is None else None
        check_kv_bits(kv_bits, press)
        self.question, self.cut, self.seed = question, cut, seed
        # in how many bits what each press leaves is kept; and which of them is asked for, see `evaluation`
        self.presses, self.kv_bits, self.turn = [press], [kv_bits], 0
        self.free_to_choose = attn_implementation == "auto"
        with self._attention():
            check_press(press, self.model)
        self.forms: dict[str, Form] = {}  # of tasks that the harness' own index may not have
        self.progress: tqdm | None = None  # a bar of someone who asks many times
        self.typical_context: torch.Tensor | None = None  # (1, T), of middle length, of the last requests
        self._answers: dict[str, list] = {}
        self._readings: list[list[Reading]] = [[]]

    # ---- what the harness asks for ----

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **special)

    def get_model_info(self) -> dict:
        """For the file of results: which weights, which press, and how much of the prompts it compressed."""
        return {
            "model_name": self.loaded.name,
            "model_source": self.loaded.source,
            "weights": self.loaded.weights,
            "press": self.press_name,
            "compression_ratio": self.compression_ratio,
            "keep_tokens": self.keep_tokens,
            "kv_bits": self.kv_bits[self.turn],
            "question": self.question,
            "cut": self.cut,
            **summary(self.readings, self.presses[self.turn] is not None),
        }

    @property
    def readings(self) -> list[Reading]:
        """One for each request that was answered."""
        return self._readings[self.turn]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        def answer():
            work = []
            for request in requests:
                ids, tokens = self._pair(request)
                work.append((self._prompt(request, ids, len(tokens)), tokens, _place(request)))
            return self._score_each(work, disable_tqdm)

        return self._answered("loglikelihood", requests, answer)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Of token ids, whose document nobody knows: all but the last token of a prompt is context."""
        work = []
        for _, ids, tokens in requests:
            room = self.max_length + 1 - len(tokens)  # the last token is never read
            work.append((shortened(ids, len(ids) - 1, room, self.cut, NO_RULE), tokens, (None, None)))
        return self._score_each(work, disable_tqdm)[self.turn]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        if self.presses[self.turn] is not None:
            raise ValueError(
                f"press={self.press_name!r}: a rolling likelihood reads a text and its context in one pass, which no "
                "press can move: the number would mean nothing. Perplexity under a press is measured by notebook 01"
            )
        found = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text)
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows = [("", *make_disjoint_window(window)) for window in rolled]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return self._answered("generate_until", requests, lambda: self._generate_each(requests, disable_tqdm))

    def _answered(self, kind: str, requests, answer: Callable[[], list[list]]) -> list:
        """Of the press whose turn it is; all presses answer the same requests in one go."""
        key = hashlib.sha256(repr([(kind, request.args) for request in requests]).encode()).hexdigest()
        if key not in self._answers or len(self.presses) == 1:
            self._answers[key] = answer()
        found = self._answers[key][self.turn]
        for request, one in zip(requests, found):
            self.cache_hook.add_partial(kind, request.args, one)
        return found

    # ---- from requests to prompts ----

    def _pair(self, request) -> tuple[list[int], list[int]]:
        context, continuation = request.args
        if context and continuation:
            ids, tokens = self._encode_pair(context, continuation)
        else:
            ids, tokens = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if tokens[:1] == ids:
                tokens = tokens[1:]
        if not tokens:
            what = "is empty" if not continuation else f"{continuation!r} is no token beside the prompt's last"
            raise ValueError(f"{_named(request)}: the continuation {what}; must be text whose likelihood is wanted")
        return ids, tokens

    def _prompt(self, request, ids: Sequence[int], n_after: int) -> Prompt:
        """What fits in front of `n_after` tokens, the last of which is never read."""
        if n_after > self.max_length:
            raise ValueError(f"{_named(request)}: {n_after} tokens after the prompt; allowed are {self.max_length}")
        n_context, rule = len(ids) - 1, INSIDE
        if self.question == "outside":
            n_context, rule = self._end_of_context(request, ids)
        return shortened(ids, n_context, self.max_length + 1 - n_after, self.cut, rule)

    def _end_of_context(self, request, ids: Sequence[int]) -> tuple[int, str]:
        prompt, task = request.args[0], request.task_name
        form = self.forms.get(task)
        end, rule = end_of_context(prompt, request.doc, lambda: form or form_of(task))
        if end is None:
            return len(ids) - 1, rule
        offsets = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return min(sum(last <= end for _, last in offsets), len(ids) - 1), rule

    # ---- answering, each request under each press ----

    def _score_each(self, work: list[tuple[Prompt, list[int], tuple]], disable_tqdm: bool) -> list[list]:
        """For each press, for each (prompt, continuation, place): its loglikelihood, and whether the model says it."""
        by_context = defaultdict(lambda: defaultdict(list))
        for row, (prompt, tokens, _) in enumerate(work):
            if not tokens:
                raise ValueError("requests: a continuation is empty; must have at least one token")
            by_context[prompt.context][prompt.rest].append(row)
        self._refuse_if_none_is_compressed([prompt for prompt, _, _ in work])
        answers = [[None] * len(work) for _ in self.presses]
        with self._attention(), self._bar(len(work), disable_tqdm) as progress:
            for context, by_rest in by_context.items():
                rows = sum(by_rest.values(), [])
                asked = {rest: [work[row][1] for row in of_rest] for rest, of_rest in by_rest.items()}
                found = compressed_each(self.model, context, self.presses, self.seed, self.kv_bits)
                for which, scored in enumerate(likelihoods(self.model, found, asked)):
                    for row, one in zip(rows, scored):
                        answers[which][row] = one
                        self._note(which, work[row][2], work[row][0], found[which])
                progress.update(len(rows))
        return answers

    def _generate_each(self, requests, disable_tqdm: bool) -> list[list[str]]:
        alike = defaultdict(list)  # rows that are decoded in the same way
        for row, request in enumerate(requests):
            alike[repr(request.args[1])].append(row)
        hows = {kind: self._how(requests[rows[0]]) for kind, rows in alike.items()}
        prompts = [self._question(request, hows[repr(request.args[1])][1]["max_new_tokens"]) for request in requests]
        self._refuse_if_none_is_compressed(prompts)
        answers = [[None] * len(requests) for _ in self.presses]
        at_once = 1 if any(decoding_part(press) is not None for press in self.presses) else self.batch_size
        with self._attention(), self._bar(len(requests), disable_tqdm) as progress:
            for kind, rows in alike.items():
                until, how = hows[kind]
                for start in range(0, len(rows), at_once):
                    batch = rows[start : start + at_once]
                    asked = [prompts[row] for row in batch]
                    found = [
                        compressed_each(self.model, one.context, self.presses, self.seed, self.kv_bits) for one in asked
                    ]
                    made = continuations(self.model, found, [prompt.rest for prompt in asked], self.presses, **how)
                    for which, tokens in enumerate(made):
                        for place, row in enumerate(batch):
                            answers[which][row] = self._text(tokens[place], until)
                            self._note(which, _place(requests[row]), asked[place], found[place][which])
                    progress.update(len(batch))
        return answers

    def _question(self, request, max_new_tokens: int) -> Prompt:
        return self._prompt(request, self.tok_encode(request.args[0]) or [self.prefix_token_id], max_new_tokens + 1)

    def _how(self, request) -> tuple[list[str], dict]:
        """Stop strings, and what `continuations` wants to know."""
        kwargs = normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS)
        idle = {"num_beams"} if kwargs.get("num_beams") == 1 else set()
        idle |= set() if kwargs["do_sample"] else {"top_p", "top_k"}  # of draws, of which there are none
        kwargs = {name: value for name, value in kwargs.items() if name not in idle}
        unknown, most = [name for name in kwargs if name not in DECODING_OPTIONS], self.max_length - 1
        if unknown:
            allowed = ", ".join(DECODING_OPTIONS)
            raise ValueError(f"generation_kwargs {', '.join(unknown)}: not to be had here; allowed are {allowed}")
        if kwargs["max_gen_toks"] > most:
            raise ValueError(
                f"max_gen_toks={kwargs['max_gen_toks']}: allowed are at most {most}, so that a prompt fits"
            )
        until = handle_stop_sequences(kwargs["until"], eos=self.tokenizer.decode(self.eot_token_id))
        temperature = kwargs["temperature"] if kwargs["do_sample"] else 0.0
        how = {"max_new_tokens": kwargs["max_gen_toks"], "temperature": temperature}
        return until, how | {"stop_when": self._says_one_of(until)}

    def _says_one_of(self, until: list[str]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Whether the last tokens (batch, n) spell one of these; a token is at least a byte."""
        longest = max((len(stop.encode()) for stop in until), default=0)

        def ended(tokens: torch.Tensor) -> torch.Tensor:
            texts = self.tokenizer.batch_decode(tokens[:, -longest - 1 :])
            return torch.tensor([any(stop and stop in text for stop in until) for text in texts])

        return ended

    def _text(self, tokens: torch.Tensor, until: list[str]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, stop=until, think_end_token=None)

    def _note(self, which: int, place: tuple, prompt: Prompt, found: Compressed) -> None:
        sizes, kept = (len(prompt.ids), prompt.n_context, prompt.n_cut), (found.kept_fraction, found.kv_bytes)
        self._readings[which].append(Reading(*place, *sizes, prompt.rule, found.press is not None, *kept))

    def _refuse_if_none_is_compressed(self, prompts: list[Prompt]) -> None:
        contexts = sorted((prompt.context for prompt in prompts), key=len)
        self.typical_context = torch.tensor([contexts[len(contexts) // 2] if contexts else ()], dtype=torch.long)
        longest = max(map(len, contexts), default=None)
        for press in self.presses:
            if press is not None and longest is not None and not is_long_enough(longest, press):
                raise ValueError(
                    f"press={type(press).__name__}: no prompt has a context that it can compress, the longest has "
                    f"{longest} token(s); give it longer ones: shots (num_fewshot), question='inside', another task"
                )

    @contextmanager
    def _bar(self, n_requests: int, disabled: bool) -> Iterator[tqdm]:
        if self.progress is not None:
            yield self.progress
            return
        with tqdm(total=n_requests, desc="requests", disable=disabled, leave=False) as bar:
            yield bar

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """One that serves the presses, if that was left open."""
        needed = {attention_needed(press) for press in self.presses} - {"any"}
        if len(needed) > 1:
            raise ValueError("presses: some read eager attention, others refuse it; evaluate them in two calls")
        needed -= {self.model.config._attn_implementation}
        with attention(self.model, *needed) if self.free_to_choose and needed else nullcontext():
            yield


def _named_press(press, compression_ratio: float, model, options: dict) -> tuple[str, object]:
    if isinstance(press, str):
        return press, make_press(press, ratio_for(press, compression_ratio, model), **options)
    if options:
        raise ValueError(f"{', '.join(options)}: unknown; allowed are the fields of a press that is given by name")
    return "no_press" if press is None else type(press).__name__, press


def _ratio_of(press) -> float | None:
    try:
        return getattr(press, "compression_ratio", None)
    except (AssertionError, ValueError):  # presses that find their own say so only after a pass
        return None


def _loaded(pretrained, tokenizer, how: dict) -> LoadedModel:
    if isinstance(pretrained, LoadedModel | PreTrainedModel):
        taken = {"weights": "pretrained", "dtype": "auto", "revision": None}
        late = [name for name, value in taken.items() if how[name] != value]
        if late:
            raise ValueError(f"{', '.join(late)}: a model that is loaded already is taken as it is; leave them out")
    if isinstance(pretrained, LoadedModel):
        return pretrained
    if isinstance(pretrained, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("tokenizer=None: must be that of the model which is given as pretrained")
        return LoadedModel(pretrained, tokenizer, pretrained.config._name_or_path or "model", "pretrained", "as given")
    return load_model(pretrained, **how)


def _batch_size(given: int | str) -> int:
    """The harness hands on what stands on its command line."""
    number = int(given) if isinstance(given, str) and given.isdigit() else given
    if isinstance(number, str):
        raise ValueError(f"batch_size={given!r}: must be a whole number; it is how many prompts are decoded together")
    check_int("batch_size", number, 1)
    return number


def _place(request) -> tuple[str | None, int | None]:
    return request.task_name, request.doc_id


def _named(request) -> str:
    return f"{request.task_name or 'request'}, document {request.doc_id}"
