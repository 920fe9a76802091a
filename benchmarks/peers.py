"""Other engines on the same weights, for decoding.py: each in an environment of its own and a process that stays alive.

Two sides of a pipe. This side makes the environment, starts this very file in it and asks; that side, `serve`, loads
the weights and answers. Questions and answers are lines of JSON: {"ids": [[1, 2], [3, 4]], "n_new": 16} is answered by
{"tokens": [[…], […]], "step_s": 0.013}, tokens being the first after the prompt and n_new more, which were timed.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

PEERS = {"CTranslate2": ("float32", "int8"), "llama.cpp": ("float32",)}
PACKAGES = {
    # Its converter wants another transformers than ours, and a torch: the one we have, lest it be a larger one.
    "CTranslate2": ["ctranslate2", "transformers<5", "torch=={torch}"],
    # It is compiled, for this processor: that needs a C++ compiler, and some minutes.
    "llama.cpp": ["llama-cpp-python", "gguf", "safetensors"],
}


# ---- this side ----


def make_environment(engine: str, folder: Path) -> str:
    """The interpreter of a new environment with all that `engine` needs."""
    python = str(folder / "bin" / "python")
    packages = [package.format(torch=version("torch").partition("+")[0]) for package in PACKAGES[engine]]
    _run(sys.executable, "-m", "venv", folder)
    _run(python, "-I", "-m", "pip", "install", "-q", *packages)
    return python


def _run(*command) -> None:
    options = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}  # llama.cpp without what it has for images
    done = subprocess.run(command, capture_output=True, text=True, env=options | os.environ)
    if done.returncode:
        errors = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError("\n  ".join([" ".join(map(str, command[1:])) + " failed:", *errors[:5]]))


class Peer:
    """A process of `python` that decodes from the weights that transformers saved in a folder."""

    def __init__(self, engine: str, dtype: str, python: str, weights: Path, threads: int):
        self.log = weights / f"{engine}-{dtype}.log"
        command = [python, "-I", __file__, engine, dtype, weights, str(threads)]
        with self.log.open("w") as log:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            self.process = subprocess.Popen(command, text=True, **pipes)
        self.version = self._answer()

    def decode(self, ids: list[list[int]], n_new: int) -> dict:
        print(json.dumps({"ids": ids, "n_new": n_new}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            last = "\n  ".join(self.log.read_text().splitlines()[-5:])
            raise RuntimeError(f"its process ended with code {self.process.wait()}:\n  {last}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()  # closes its standard input, at which it ends


# ---- that side: imports only what its own environment holds ----


def serve(engine: str, dtype: str, weights: Path, threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    decode = ctranslate2(weights, dtype, threads) if engine == "CTranslate2" else llama_cpp(weights, threads)
    print(json.dumps(version(PACKAGES[engine][0])), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        tokens, step_s = decode(**question)
        assert {len(row) for row in tokens} == {question["n_new"] + 1}, "a row ended early"
        print(json.dumps({"tokens": tokens, "step_s": step_s}), file=answers, flush=True)


def ctranslate2(weights: Path, dtype: str, threads: int):
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    target = weights / "ctranslate2"
    if not target.exists():
        # It speaks in words: here those of a vocabulary in which each id is its own name.
        n_words = json.loads((weights / "config.json").read_text())["vocab_size"]
        words = Tokenizer(models.WordLevel({str(i): i for i in range(n_words)}, unk_token="0"))
        special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "0")
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(weights)
        TransformersConverter(str(weights)).convert(str(target))
    generator = Generator(str(target), compute_type=dtype, inter_threads=1, intra_threads=threads)

    def decode(ids: list[list[int]], n_new: int):
        times = []  # of each row's token, step by step
        made = generator.generate_batch(
            [[str(i) for i in row] for row in ids],
            **dict(max_length=n_new + 1, end_token=[], include_prompt_in_result=False),
            callback=lambda _: times.append(time.perf_counter()),
        )
        return [one.sequences_ids[0] for one in made], (times[-len(ids)] - times[0]) / n_new

    return decode


def llama_cpp(weights: Path, threads: int):
    """Weights and cache in float32; a stream of its own in the cache for each row."""
    import llama_cpp as lib
    import numpy as np

    path = weights / "model.gguf"
    write_gguf(weights, path)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    n_words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def read(context, tokens: np.ndarray, position: int) -> np.ndarray:
        """Read tokens (rows, n) from `position` on; the greedy token (rows,) after them."""
        rows, n = tokens.shape
        batch = lib.llama_batch_init(rows * n, 0, 1)
        batch.n_tokens = rows * n
        for i in range(rows * n):
            batch.token[i], batch.pos[i] = int(tokens[i // n, i % n]), position + i % n
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i // n, i % n == n - 1
        assert lib.llama_decode(context, batch) == 0, "llama_decode failed"
        found = []
        for row in range(rows):
            logits = lib.llama_get_logits_ith(context, row * n + n - 1)
            found.append(
                np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (n_words,)).argmax()
            )
        lib.llama_batch_free(batch)
        return np.array(found)

    def decode(ids: list[list[int]], n_new: int):
        ids = np.array(ids)
        rows, n = ids.shape
        params = lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.n_batch = rows, rows * (n + n_new + 1), rows * n
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.kv_unified = False
        context = lib.llama_init_from_model(model, params)
        tokens = [read(context, ids, 0)]
        start = time.perf_counter()
        for step in range(n_new):
            tokens.append(read(context, tokens[-1][:, None], n + step))
        step_s = (time.perf_counter() - start) / n_new
        lib.llama_free(context)
        return np.stack(tokens, 1).tolist(), step_s

    return decode


def write_gguf(weights: Path, path: Path) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((weights / "config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPTNEOX])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_dimension_count(int(config["rotary_pct"] * config["head_dim"]))
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPTNEOX, config["num_hidden_layers"])
    with safe_open(weights / "model.safetensors", "numpy") as stored:
        for name in stored.keys():
            tensor = stored.get_tensor(name)
            if ".query_key_value." in name:  # rows of a head's query, key, value -> all queries, all keys, all values
                heads = tensor.reshape(config["num_attention_heads"], 3, -1, *tensor.shape[1:])
                tensor = heads.swapaxes(0, 1).reshape(tensor.shape)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
