"""The kernels of a decoding step compute what the ordinary ones do, whatever the shape, the dtype and the threads."""

import json
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, relative_difference, stock_and_ours, tiny_config
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from kvneox_lib import continuation_nll, generate, make_press, press_names
from kvneox_lib.neox import compiled, kernels
from kvneox_lib.neox.kernels import (
    attend_with_few_queries,
    attend_with_one_query,
    is_plain,
    linear_of_few_rows,
    packed_weights,
)
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.neox.ragged import RaggedLayer
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.by_name import layer_ramp
from kvneox_lib.presses.facts import attention_needed
from kvneox_lib.presses.registry import RATIO_PER_LAYER, REGISTRY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 80, 128, 256)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def off_by(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error relative to the largest number, less what rounding to the dtype of `out` costs."""
    assert out.shape == exact.shape
    rounding = torch.finfo(out.dtype).eps / 2
    return float((out.double() - exact).abs().max() / exact.abs().max()) - rounding


def exact_attention(query, key, value, scaling: float) -> torch.Tensor:
    """In float64 for one row, all (n, D); zeros for a query that sees no key."""
    query, key, value = (states.double() for states in (query, key, value))
    scores, surplus = query @ key.t() * scaling, len(key) - len(query)
    scores = scores.masked_fill(torch.ones_like(scores).tril(surplus) == 0, -torch.inf)
    output = scores.softmax(-1) @ value
    output[: max(0, -surplus)] = 0
    return output


def exact_rows(query, keys, values, scaling: float) -> torch.Tensor:
    """query (batch, heads, n, D); keys and values one (n_i, D) for each row."""
    rows = [exact_attention(*states, scaling) for states in zip(query.flatten(0, 1), keys, values)]
    return torch.stack(rows).view(query.shape)


# -- few queries over all keys and values -----------------------------------------------------------------------------

LAYOUTS = {
    "as it is": lambda numbers, batch, heads, n, dim: numbers(batch, heads, n, dim),
    "a buffer with room": lambda numbers, batch, heads, n, dim: numbers(batch, heads, n + 9, dim)[:, :, :n],
    "heads within tokens": lambda numbers, batch, heads, n, dim: numbers(batch, n, heads, dim).transpose(1, 2),
    "every other token": lambda numbers, batch, heads, n, dim: numbers(batch, heads, 2 * n, dim)[:, :, 1::2],
    "a part of each token": lambda numbers, batch, heads, n, dim: numbers(batch, heads, n, 3 * dim)[..., dim:-dim],
    "odd steps": lambda numbers, batch, heads, n, dim: numbers(batch, heads, n, dim + 1)[..., 1:],
    "within a word": lambda numbers, *shape: numbers(math.prod(shape) + 1)[1:].view(shape),
    "every other number": lambda numbers, batch, heads, n, dim: numbers(batch, heads, n, 2 * dim)[..., ::2],
    "one head for all": lambda numbers, batch, heads, n, dim: numbers(batch, 1, n, dim).expand(-1, heads, -1, -1),
    "one row for all": lambda numbers, batch, heads, n, dim: numbers(1, heads, n, dim).expand(batch, -1, -1, -1),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_any_shape_is_that_of_float64(dtype, monkeypatch):
    draw, numbers = random.Random(0), partial(torch.randn, dtype=dtype)
    for _ in range(150):
        batch, heads, dim = draw.randint(1, 3), draw.randint(1, 4), draw.choice(HEAD_DIMS)
        n_queries, n_keys = draw.randint(1, 8), draw.choice([1, 2, 3, 8, 63, 64, 65, 130, draw.randint(1, 400)])
        layouts = draw.choices(list(LAYOUTS), k=2)
        shares = draw.choice([1, 2, 3, 4, 7, 50])
        monkeypatch.setattr(compiled, "SHARES_PER_THREAD", shares)
        key, value = (LAYOUTS[draw.choice(layouts)](numbers, batch, heads, n_keys, dim) for _ in range(2))
        query = LAYOUTS[draw.choice(layouts)](numbers, batch, heads, n_queries, dim)
        out = attend_with_few_queries(query, key, value, dim**-0.5)
        expected = exact_rows(query, key.flatten(0, 1), value.flatten(0, 1), dim**-0.5)
        assert out.dtype == dtype
        assert off_by(out, expected) < 1e-5, (batch, heads, n_queries, n_keys, dim, layouts, shares)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_unequal_length(dtype, monkeypatch):
    """As a cache holds them after a head-wise press: compressed entries, some rows without any, then new ones."""
    draw = random.Random(1)
    for _ in range(40):
        batch, heads, dim = draw.randint(1, 3), draw.randint(1, 4), draw.choice(HEAD_DIMS)
        lengths = [draw.choice([0, 0, 1, 7, 8, 9, draw.randint(0, 300)]) for _ in range(batch * heads)]
        monkeypatch.setattr(compiled, "SHARES_PER_THREAD", draw.choice([1, 3, 4, 30]))
        keys, values = ([torch.randn(n, dim).to(dtype) for n in lengths] for _ in range(2))
        layer = RaggedLayer(keys, values, batch, max(lengths), headroom=draw.choice([0, 20]))
        for n_new in (draw.randint(1, 8), 1, draw.randint(1, 8)):
            query, key, value = (torch.randn(batch, heads, n_new, dim).to(dtype) for _ in range(3))
            out = layer.attend(query, key, value, dim**-0.5)
            keys = [torch.cat(parts) for parts in zip(keys, key.flatten(0, 1))]
            values = [torch.cat(parts) for parts in zip(values, value.flatten(0, 1))]
            assert off_by(out, exact_rows(query, keys, values, dim**-0.5)) < 1e-5, (lengths, n_new, dim)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_shares", [1, 3, 16])
def test_scores_of_any_size(dtype, n_shares, monkeypatch):
    """Up to 10,000, growing and falling along the context, far and near; exact in any dtype, as numbers are whole."""
    monkeypatch.setattr(compiled, "SHARES_PER_THREAD", n_shares)
    n, dim = 300, 32
    rise = torch.arange(n).float() / n
    for course in (rise, -rise, 1 - rise, rise - 1, (rise * 40).sin(), torch.zeros(n) + 1, torch.zeros(n) - 1):
        key, value = torch.zeros(1, 1, n, dim), torch.randn(1, 1, n, dim).to(dtype)
        key[..., 0] = (course * 100).round()
        key[..., 1] = torch.randint(-2, 3, (n,))
        query = torch.zeros(1, 1, 2, dim)
        query[..., 0], query[..., 1] = torch.tensor([100, 1]), 0.5
        query, key = query.to(dtype), key.to(dtype)
        out = attend_with_few_queries(query, key, value, 1.0)
        assert off_by(out, exact_rows(query, key[0], value[0], 1.0)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_stays_so_where_it_is_seen(dtype, monkeypatch):
    """In a query: all of its answer; in a key: those of all queries that see it; in a value: that number of theirs."""
    for n_keys, n_shares in [(3, 1), (3, 16), (200, 1), (200, 5)]:
        monkeypatch.setattr(compiled, "SHARES_PER_THREAD", n_shares)
        query = torch.randn(2, 2, 3, 32).to(dtype)
        key, value = (torch.randn(2, 2, n_keys, 32).to(dtype) for _ in range(2))
        clean = attend_with_few_queries(query, key, value, 0.2)
        for position in (0, n_keys // 2, n_keys - 2, n_keys - 1):
            for spoilt in (0, 1, 2):
                states = [query.clone(), key.clone(), value.clone()]
                states[spoilt][1, 0, min(position, 2) if spoilt == 0 else position, 5] = torch.nan
                since = max(0, position - (n_keys - 3))  # the first query that sees the key
                expected = torch.zeros(query.shape, dtype=torch.bool)
                if spoilt == 0:
                    expected[1, 0, min(position, 2)] = True
                elif spoilt == 1:
                    expected[1, 0, since:] = True
                else:
                    expected[1, 0, since:, 5] = True
                out = attend_with_few_queries(*states, 0.2)
                assert torch.equal(out.isnan(), expected) and torch.equal(out[~expected], clean[~expected])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_as_torch_has_them(dtype, monkeypatch):
    """Scores of -inf count nothing, be it a single one, all of a tile or all of a share; +inf, or nothing else, is NaN;
    an infinite value is infinite."""
    query, key, value = (torch.randn(1, 1, n, 32) for n in (1, 200, 200))
    query[..., 0] = 1
    for hidden in ([7], [199], range(64), range(190, 200), range(100), range(200)):
        for number, of in ((-torch.inf, key), (torch.inf, key), (torch.inf, value), (-torch.inf, value)):
            spoilt = of.clone()
            spoilt[0, 0, list(hidden), 0] = number
            states = [x.to(dtype) for x in (query, spoilt if of is key else key, spoilt if of is value else value)]
            expected = exact_rows(states[0], states[1][0], states[2][0], 0.2)
            for n_shares in (1, 5, 200):
                monkeypatch.setattr(compiled, "SHARES_PER_THREAD", n_shares)
                out = attend_with_few_queries(*states, 0.2)
                close = partial(torch.allclose, rtol=0, atol=1e-5 + float(torch.finfo(dtype).eps), equal_nan=True)
                assert close(out.double(), expected), (hidden, number, n_shares)


@torch.no_grad()
def test_no_key_gives_zeros():
    nothing, query = torch.zeros(2, 2, 0, 32), torch.randn(2, 2, 3, 32)
    assert torch.equal(attend_with_few_queries(query, nothing, nothing, 1.0), torch.zeros(2, 2, 3, 32))
    one = torch.randn(2, 2, 1, 32)
    out = attend_with_few_queries(query, one, one, 1.0)
    assert torch.equal(out, torch.cat([torch.zeros(2, 2, 2, 32), one], dim=2))


def test_attention_with_one_query():
    query, key, value = torch.randn(6, 1, 16), torch.randn(6, 30, 16), torch.randn(6, 30, 16)
    expected = scaled_dot_product_attention(query, key, value)
    assert relative_difference(attend_with_one_query(query, key, value, 0.25), expected) < 1e-5


def test_keys_are_rounded_as_torch_rounds_them():
    """All first 16 bits, followed by some that are halves, or next to them: denormals, inf and NaN among them."""
    first = torch.arange(2**16)[:, None] << 16
    bits = (first + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    numbers = bits.to(torch.int32).view(torch.float32)
    words = np.zeros(len(numbers) // 2, np.uint32)
    compiled.store(numbers.numpy(), words, 0)
    ours, torchs = torch.from_numpy(words.view(np.int16)), numbers.bfloat16().view(torch.int16)
    no_number = numbers.isnan()
    assert torch.equal(ours[~no_number], torchs[~no_number])
    assert ours.view(torch.bfloat16)[no_number].isnan().all()


# -- few rows times all weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 24), (3, 1, 24), (32, 24), (33, 24), (2, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows(shape, bias):
    module, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    out = linear_of_few_rows(module, x)
    assert out.shape == (*shape[:-1], 40) and relative_difference(out, module(x)) < 1e-5
    low = module.to(torch.bfloat16)
    assert torch.equal(linear_of_few_rows(low, x.bfloat16()), low(x.bfloat16()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_float64(dtype, monkeypatch):
    """By the kernel alone and behind a module; odd numbers of outputs, fewer than there are shares, odd inputs."""
    for n_in in (2, 24, 130, *([1, 25] if dtype == torch.float32 else [])):
        for n_out in (1, 2, 3, 5, 17, 64, 129):
            for bias in (False, True):
                module = nn.Linear(n_in, n_out, bias=bias).to(dtype)
                for n_rows in (1, 2, 3, 4):
                    monkeypatch.setattr(compiled, "SHARES_PER_THREAD", n_rows * 3)
                    x = torch.randn(n_rows, n_in).to(dtype)
                    exact = linear(x.double(), module.weight.double(), module.bias.double() if bias else None)
                    alone = compiled.multiply(x, module.weight, module.bias)
                    assert alone.dtype == torch.float32 and off_by(alone, exact) < 1e-5
                    assert off_by(linear_of_few_rows(module, x), exact) < 1e-5
                    apart = torch.randn(n_rows, 2 * n_in).to(dtype)[:, ::2]
                    exact = linear(apart.double(), module.weight.double(), module.bias.double() if bias else None)
                    assert off_by(linear_of_few_rows(module, apart), exact) < 1e-5


@torch.no_grad()
def test_weights_that_do_not_lie_as_they_are_read_are_left_to_torch():
    """Rows of half a word, the transpose of another, a place within a word."""
    for dtype in (torch.float32, torch.bfloat16):
        transposed, within = nn.Linear(24, 24), nn.Linear(24, 24)
        transposed.weight = nn.Parameter(torch.randn(24, 24).to(dtype).t())
        within.weight = nn.Parameter(torch.randn(24 * 24 + 1).to(dtype)[1:].view(24, 24))
        for module in (nn.Linear(25, 24), transposed, within):
            module = module.to(dtype)
            x = torch.randn(3, module.in_features).to(dtype)
            assert relative_difference(linear_of_few_rows(module, x), module(x)) < 1e-2
            assert torch.equal(linear_of_few_rows(module, x), module(x)) or dtype == torch.float32


def test_a_module_that_is_watched_or_replaced_is_called_itself():
    """Hooks, adapters and quantized layers would be passed by otherwise."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x, calls = Doubling(8, 8), torch.randn(1, 8), []
    assert torch.equal(linear_of_few_rows(module, x), module(x))
    module = nn.Linear(8, 8)
    assert is_plain(module)
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    linear_of_few_rows(module, x)
    handle.remove()
    assert calls == [1]
    module.forward = lambda x: calls.append(2)
    linear_of_few_rows(module, x)
    assert calls == [1, 2]


# -- packed copies of weights -----------------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """Of no other test."""
    monkeypatch.setattr(kernels, "_copies", type(kernels._copies)())
    return kernels._copies


def packable(dtype: torch.dtype):
    """A small model whose products can be packed: with more than four rows all are."""
    if not kernels._packing_works(dtype):
        pytest.skip(f"this processor, or this build of torch, has no packed products in {dtype}")
    return stock_and_ours(tiny_config(), dtype=dtype)[1]


def products(model) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def nothing_left(model) -> bool:
    return not any("kvneox_packed" in module.__dict__ for module in model.modules())


def check_products(model, rows=(5, 8, 16, 31, 32)) -> None:
    for module in products(model):
        for n_rows in rows:
            x = torch.randn(n_rows, module.in_features).to(module.weight.dtype)
            bias = None if module.bias is None else module.bias.double()
            exact = linear(x.double(), module.weight.double(), bias)
            # libraries round a sum of halves now and then to the other neighbour
            assert off_by(linear_of_few_rows(module, x), exact) < (1e-5 if x.dtype == torch.float32 else 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_modules_own_products(dtype, copies):
    model = packable(dtype)
    for n_rows in (5, 32):
        with packed_weights(model, n_rows):
            assert all(module.__dict__["kvneox_packed"] is not None for module in products(model))
            check_products(model)
        assert nothing_left(model)
    assert set(copies) == set(products(model))
    with packed_weights(model, 33):
        assert nothing_left(model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_made_anew_when_weights_have_changed(dtype, copies):
    """Written to behind torch's back, which counts no version then; and they are not made anew otherwise."""
    model = packable(dtype)
    with packed_weights(model, 8):
        before = {module: module.__dict__["kvneox_packed"] for module in products(model)}
    changed = model.model.layers[0].attention.dense
    version = changed.weight._version
    changed.weight.data.mul_(2)
    assert changed.weight._version == version
    with packed_weights(model, 8):
        check_products(model, rows=[8])
        anew = [module for module in before if module.__dict__["kvneox_packed"] is not before[module]]
    assert anew == [changed]


@torch.no_grad()
def test_copies_stop_at_their_share_of_memory(copies, monkeypatch):
    model = packable(torch.float32)
    size = sum(module.weight.nbytes for module in products(model))
    monkeypatch.setattr(kernels, "memory_bytes", lambda: size / 2 / kernels.PACKED_SHARE)
    with packed_weights(model, 8):
        packed = [module.__dict__["kvneox_packed"] is not None for module in products(model)]
        check_products(model, rows=[8])
    assert any(packed) and not all(packed)
    assert sum(module.weight.nbytes for module in copies) <= size / 2
    del model, packed
    another = packable(torch.float32)  # the copies of a model that is gone take no share
    with packed_weights(another, 8):
        assert any(module.__dict__["kvneox_packed"] is not None for module in products(another))


@torch.no_grad()
def test_nothing_is_left_on_modules_whatever_happens(copies, monkeypatch):
    model = packable(torch.float32)
    with pytest.raises(RuntimeError, match="within"), packed_weights(model, 8):
        raise RuntimeError("within")
    assert nothing_left(model)
    pack, calls = kernels._packed_copy, []

    def failing(module):
        calls.append(module)
        if len(calls) == 3:
            raise MemoryError
        return pack(module)

    monkeypatch.setattr(kernels, "_packed_copy", failing)
    with pytest.raises(MemoryError), packed_weights(model, 8):
        pass
    assert nothing_left(model)


@torch.no_grad()
def test_hooks_see_packed_modules_too(copies):
    """Those that are there before, and those that come while weights are packed."""
    model, calls = packable(torch.float32), []
    first, second, *_ = products(model)
    hook = lambda module, args, output: calls.append(module)  # noqa: E731
    first.register_forward_hook(hook)
    with packed_weights(model, 8):
        second.register_forward_hook(hook)
        model.model(torch.randint(0, 97, (8, 1)))
    assert calls == [first, second]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_autocast_is_left_to_torch(batch, copies):
    """It multiplies float32 weights in bfloat16 and leaves a cache of both dtypes."""
    _, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (batch, 20))
    with torch.autocast("cpu", torch.bfloat16):
        made = generate(ours, ids, max_new_tokens=3, stop_at_eos=False, with_logits=True)
    expected = stock_twin(ours)(torch.cat([ids, made.tokens[:, :-1]], 1)).logits[:, 19:]
    assert 1e-5 < relative_difference(made.logits, expected) < 0.05


# -- threads ----------------------------------------------------------------------------------------------------------


def some_products() -> list[torch.Tensor]:
    """One by each kernel, of numbers that are always the same."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(130, 64, generator=draw)
    query, key, value = (torch.randn(2, 3, n, 64, generator=draw) for n in (2, 300, 300))
    _, ours = with_seed(lambda: stock_and_ours(tiny_config()))
    ids = torch.randint(0, 97, (2, 30), generator=draw)
    made = generate(ours, ids, max_new_tokens=3, stop_at_eos=False, with_logits=True)
    return [
        compiled.multiply(query[0, :, 0], weight, None),
        attend_with_few_queries(query, key, value, 0.125),
        made.logits,
    ]


def with_seed(make):
    torch.manual_seed(7)
    return make()


class Counting:
    """In the place of torch's OpenMP, which it calls."""

    def __init__(self):
        self.openmp, self.asked = compiled.torchs_openmp(), []

    def GOMP_parallel(self, kernel, arguments, n_threads, flags):
        self.asked.append(n_threads)
        self.openmp.GOMP_parallel(kernel, arguments, n_threads, flags)


@torch.no_grad()
def test_as_many_threads_as_torch_is_told(monkeypatch):
    if compiled.torchs_openmp() is None:
        pytest.skip("torch's OpenMP cannot be called from here")
    counting, before, results = Counting(), torch.get_num_threads(), []
    monkeypatch.setattr(compiled, "torchs_openmp", lambda: counting)
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            counting.asked.clear()
            results.append(some_products())
            # one thread needs no others: the kernel is called as it is
            assert set(counting.asked) == (set() if n_threads == 1 else {n_threads})
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(relative_difference(one, other) < 1e-5 for one, other in zip(result, results[0]))


@torch.no_grad()
def test_threads_of_our_own_where_torchs_cannot_be_called(monkeypatch, two_threads):
    expected = some_products()
    submitted, pool = [], compiled._pool
    monkeypatch.setattr(compiled, "_pool", lambda n: submitted.append(n) or pool(n))
    monkeypatch.setattr(compiled, "torchs_openmp", lambda: None)
    for n_threads in (2, 3):
        torch.set_num_threads(n_threads)
        found = some_products()
        assert all(relative_difference(one, other) < 1e-5 for one, other in zip(found, expected))
    assert set(submitted) == {1, 2}


@torch.no_grad()
@pytest.mark.parametrize("openmp", [True, False])
def test_two_threads_with_a_model_each(openmp, monkeypatch, two_threads):
    if not openmp:
        monkeypatch.setattr(compiled, "torchs_openmp", lambda: None)
    models = [stock_and_ours(tiny_config())[1] for _ in range(2)]
    ids = torch.randint(0, 97, (2, 2, 30))

    def ask(which: int) -> torch.Tensor:
        return generate(models[which], ids[which], max_new_tokens=20, stop_at_eos=False, with_logits=True).logits

    alone = [ask(0), ask(1)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for found, expected in zip(pool.map(ask, (0, 1)), alone):
                assert relative_difference(found, expected) < 1e-5


# -- through the model ------------------------------------------------------------------------------------------------

ANSWERS = """
import warnings

import torch
from conftest import stock_and_ours, tiny_config

from kvneox_lib import generate, make_press

torch.manual_seed(0)
model, ids = stock_and_ours(tiny_config())[1], torch.randint(0, 97, (3, 100))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answers = [
        generate(model, ids[:rows], press=make_press(name), max_new_tokens=5, stop_at_eos=False).tokens.tolist()
        for name in ("no_press", "knorm", "adakv_snapkv")
        for rows in (1, 3)
    ]
said = sum("numba cannot be imported" in str(warning.message) for warning in caught)
"""


def test_without_numba():
    """Tokens are the same, and it is said once."""
    here = {}
    exec(ANSWERS, here)
    path = [str(REPOSITORY), str(REPOSITORY / "tests")]
    script = f'import json, sys; sys.modules["numba"] = None; sys.path[:0] = {path}\n{ANSWERS}'
    script += 'print(json.dumps([said, "kvneox_lib.neox.compiled" in sys.modules, answers]))'
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [1, False, here["answers"]]
    assert here["said"] == 0


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_single_tokens_through_the_model_are_the_stock_models(batch):
    _, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (batch, 30))
    cache = ours(ids[:, :20], use_cache=True).past_key_values
    steps = [ours(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    assert relative_difference(torch.cat(steps, dim=1), stock_twin(ours)(ids).logits[:, 20:]) < 1e-5


@torch.no_grad()
def test_the_mlp_in_slices_is_the_mlp(monkeypatch):
    _, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (2, 50))
    expected = ours(ids).logits
    monkeypatch.setattr("kvneox_lib.neox.modeling.TOKENS_PER_SLICE", 14)
    widest = []
    handle = ours.model.layers[0].mlp.dense_h_to_4h.register_forward_hook(lambda m, a, out: widest.append(out.shape[1]))
    assert relative_difference(ours(ids).logits, expected) < 1e-5
    handle.remove()
    assert widest == [7] * 7 + [1]


def press_at_work(name: str, n_layers: int):
    """So strong, and acting so often, that it evicts from a short context and while decoding."""
    row = REGISTRY[name]
    wanted = {"compression_interval": 4, "target_size": 100, **({"window_size": 2} if "decoding" in name else {})}
    options = {option: value for option, value in wanted.items() if option in row.defaults}
    return make_press(name, layer_ramp(0.5, n_layers) if row.strength == RATIO_PER_LAYER else 0.5, **options)


@pytest.mark.parametrize("name", press_names())
def test_every_press_gives_what_it_gives_without_kernels(name, demo, monkeypatch):
    """No token comes twice: the keys of two alike are as good as each other, and rounding would choose between them."""
    ids = torch.randperm(demo.config.vocab_size)[None, :305]

    def ask():
        press = press_at_work(name, demo.config.num_hidden_layers)
        with attention(demo, "eager" if attention_needed(press) == "eager" else "sdpa"):
            torch.manual_seed(3)
            made = generate(demo, ids[:, :300], press=press, max_new_tokens=6, stop_at_eos=False, with_logits=True)
            torch.manual_seed(3)
            return made, continuation_nll(demo, ids, n_context=300, press=press)

    made, nll = ask()
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    monkeypatch.setattr(kernels, "_packing_works", lambda dtype: False)
    expected, expected_nll = ask()
    assert torch.equal(made.tokens, expected.tokens)
    assert torch.equal(made.kv_lengths, expected.kv_lengths)
    assert 0 < relative_difference(made.logits, expected.logits) < 1e-4  # 0: there was nothing to switch off
    assert relative_difference(nll, expected_nll) < 1e-5
