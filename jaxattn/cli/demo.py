"""`jaxattn demo`: the whole path on real text, on a CPU, in about two minutes.

Train a byte-level decoder on functions of Python's standard library, packed whole; save it as an
Orbax Flax checkpoint; load it back; nest prompts of very different lengths; generate on every
implementation; and check that all of them, and a dense padded forward pass, agree.
"""

from __future__ import annotations

import ast
import functools
import itertools
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from jaxattn.attention.implementations import IMPLEMENTATIONS
from jaxattn.batch.bucket import Bucket
from jaxattn.batch.nest import nest_sequences
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.cache.pool import PagePool
from jaxattn.checkpoints import load_model, save_params
from jaxattn.metadata.prepare import prepare_metadata
from jaxattn.metadata.rope import rope_tables, rotate
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.models import DecoderConfig, Model, forward, init_model_cache, init_params, unembed
from jaxattn.models.decoder import rms_norm
from jaxattn.models.params import Params
from jaxattn.models.steps import step
from jaxattn.serving.generate import generate
from jaxattn.training.losses import next_token_cross_entropy
from jaxattn.training.packing import nest_batches, pack_best_fit
from jaxattn.viz import padding_waste, plot_schedule

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=512,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    sliding_windows=(None, 64, None, None),
)
SOURCES = (
    "argparse bisect calendar cmd collections/__init__ configparser contextlib copy csv dataclasses "
    "difflib dis enum fileinput fnmatch fractions functools getopt glob heapq inspect ipaddress "
    "json/decoder json/encoder logging/__init__ mailbox numbers optparse os pdb pickle platform "
    "pprint queue random reprlib sched shelve shlex shutil smtplib socket statistics string "
    "subprocess tarfile tempfile textwrap threading timeit tokenize traceback types typing "
    "unittest/case urllib/parse uuid warnings weakref"
).split()
"""Files of Python's standard library; their functions are the training text."""

DOCUMENT_LENS = range(64, 321)
TRAIN_BUCKET = Bucket(tokens=320, seqs=8)
TRAIN_STEPS = 1000
MAX_NEW_TOKENS = 64
PAGE_SIZE = 16
PORTABLE = tuple(name for name in IMPLEMENTATIONS if name != "mosaic")
"""The implementations that run everywhere."""


def run_demo(out: Path, *, train_steps: int = TRAIN_STEPS) -> None:
    """Run the demo and print what it does.

    Args:
        out: Folder for the checkpoint and the picture; a checkpoint that is there is reused.
        train_steps: Optimiser steps of a new checkpoint.

    Raises:
        RuntimeError: If two implementations disagree.
    """
    console = Console(soft_wrap=True)
    documents = standard_library_functions()
    held_out = documents.pop(next(i for i, document in enumerate(documents) if len(document) > 240))
    checkpoint = trained_checkpoint(console, out, documents, train_steps)
    started = time.perf_counter()
    model = load_model(checkpoint)
    num_params = sum(x.size for x in jax.tree.leaves(model.params))
    console.print(
        f"[bold]2. Load:[/] {num_params / 1e6:.2f} M parameters, {model.compiled.dtype}, "
        f"in {time.perf_counter() - started:.1f} s"
    )
    prompts = [b"d", b"def __init__(self", b"    if not isinstance(", bytes(held_out[:160])]
    prompts = [np.frombuffer(prompt, np.uint8) for prompt in prompts]
    batch, metadata = _show_batch(console, prompts)
    picture = out / "schedule.png"
    plot_schedule(batch, metadata).savefig(picture, dpi=120)
    tokens = _generate_everywhere(console, model, prompts)
    _check_against_dense(console, model, prompts, tokens)
    _show_text(console, prompts, tokens)
    _show_counts(console, model, batch)
    console.print(f"\nThe schedule of the prompts' batch: [bold]{picture}[/]")


def standard_library_functions(lens: range = DOCUMENT_LENS) -> list[np.ndarray]:
    """Functions of Python's standard library of these lengths, as bytes, in a fixed shuffled order."""
    texts: set[str] = set()
    for name in SOURCES:
        path = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        if not path.is_file():
            continue  # another version of Python may have moved it
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
        texts.update("".join(lines[node.lineno - 1 : node.end_lineno]) for node in functions)
    ordered = sorted(text for text in texts if len(text) in lens)
    shuffled = np.random.default_rng(0).permutation(len(ordered))
    return [np.frombuffer(ordered[i].encode("ascii", "replace"), np.uint8) for i in shuffled]


def training_batches(documents: list[np.ndarray], bucket: Bucket, seed: int = 0) -> Iterator[RaggedBatch]:
    """Whole documents, in a new order in every epoch, packed into batches of the bucket; without end."""
    rng = np.random.default_rng(seed)
    stream = (documents[i] for _ in itertools.count() for i in rng.permutation(len(documents)))
    return nest_batches(pack_best_fit(stream, bucket), bucket)


def next_token_loss(params: Params, batch: RaggedBatch, config: DecoderConfig = CONFIG) -> Float[Array, ""]:
    """Mean cross-entropy of each token's successor in its own document, in nats."""
    metadata = prepare_metadata(batch, config.layer_specs())
    hidden, _ = forward(params, config, batch.token_ids, metadata)
    return next_token_cross_entropy(unembed(params, config, hidden), batch)


def trained_checkpoint(console: Console, out: Path, documents: list[np.ndarray], steps: int) -> Path:
    """The checkpoint of a trained decoder: one that is in `out` already, or a new one."""
    checkpoint = out / f"checkpoint-{steps}"
    if checkpoint.is_dir():
        console.print(f"[bold]1. Train:[/] reusing {checkpoint}; delete it to train again")
        return checkpoint
    params = _train(console, documents, steps)
    unfinished = checkpoint.with_name(checkpoint.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was interrupted
    save_params(unfinished, params, CONFIG)
    unfinished.rename(checkpoint)
    console.print(f"   saved as an Orbax checkpoint: {checkpoint}")
    return checkpoint


def _train(console: Console, documents: list[np.ndarray], steps: int) -> Params:
    total = sum(map(len, documents))
    console.print(
        f"[bold]1. Train:[/] {len(documents)} functions of the standard library, {total / 1e6:.2f} MB"
    )
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99))
    params = init_params(jax.random.key(0), CONFIG)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Any, state: Any, batch: RaggedBatch) -> tuple[Any, Any, Array]:
        loss, gradients = jax.value_and_grad(next_token_loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    started = time.perf_counter()
    batches = training_batches(documents, TRAIN_BUCKET)
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=steps)
        for batch, _ in zip(batches, range(steps), strict=False):
            params, state, loss = train_step(params, state, batch)
            losses.append(float(loss))
            progress.update(task, advance=1, description=f"training, loss {losses[-1]:.2f}")
    start, end = np.mean(losses[:5]), np.mean(losses[-20:])
    seconds = time.perf_counter() - started
    console.print(f"   loss {start:.2f} -> {end:.2f} nats per byte in {steps} steps and {seconds:.0f} s")
    return params


def _show_batch(console: Console, prompts: list[np.ndarray]) -> tuple[RaggedBatch, AttentionMetadata]:
    """Nest the prompts, as `generate` does, and print the batch."""
    pool = PagePool(num_pages=64, page_size=PAGE_SIZE)
    batch = nest_sequences(
        prompts,
        page_tables=[pool.allocate(len(prompt) + MAX_NEW_TOKENS) for prompt in prompts],
        page_size=PAGE_SIZE,
        num_pages=pool.num_pages,
        vocab_size=CONFIG.vocab_size,
    )
    console.print(
        f"[bold]3. Nest:[/] prompts of {', '.join(str(len(p)) for p in prompts)} tokens in the bucket "
        f"T={batch.bucket.tokens} R={batch.bucket.seqs} P={batch.bucket.pages}, "
        f"{padding_waste(batch):.0%} padding; one transfer of {batch.packed.nbytes / 1024:.1f} KiB"
    )
    return batch, prepare_metadata(batch, CONFIG.layer_specs())


def _generate_everywhere(console: Console, model: Model, prompts: list[np.ndarray]) -> list[list[int]]:
    """Generate on every implementation, timed; all must write the same tokens."""
    table = Table("implementation", "compile and run", "run again", "tokens per second", box=None)
    results = {}
    for implementation in PORTABLE:
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            results[implementation] = generate(
                model, prompts, MAX_NEW_TOKENS, implementation=implementation, page_size=PAGE_SIZE
            )
            seconds.append(time.perf_counter() - started)
        rate = len(prompts) * MAX_NEW_TOKENS / seconds[1]
        interpreted = implementation == "triton" and jax.default_backend() != "gpu"
        name = f"{implementation} (interpreted)" if interpreted else implementation
        table.add_row(name, f"{seconds[0]:.1f} s", f"{seconds[1]:.2f} s", f"{rate:.0f}")
    console.print(f"[bold]4. Generate[/] {MAX_NEW_TOKENS} tokens per prompt, {jax.default_backend()}:")
    console.print(table)
    first, *others = results
    for other in others:
        if results[other] != results[first]:
            raise RuntimeError(
                f"{other} wrote other tokens than {first}; please report this with `jaxattn info`"
            )
    console.print("   all implementations wrote the same tokens")
    return results[first]


def _check_against_dense(
    console: Console, model: Model, prompts: list[np.ndarray], tokens: list[list[int]]
) -> None:
    """Compare with a dense padded forward pass over prompts and new tokens."""
    texts = [
        np.concatenate([prompt, new]).astype(np.int32) for prompt, new in zip(prompts, tokens, strict=True)
    ]
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    with jax.default_matmul_precision("highest"):  # on a GPU float32 products are rounded otherwise
        logits = jax.jit(jax.vmap(lambda ids: dense_logits(model, ids)))(jnp.asarray(padded))
    likeliest = np.asarray(logits.argmax(-1))
    for i, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
        if likeliest[i, len(prompt) - 1 : len(prompt) + len(new) - 1].tolist() != new:
            raise RuntimeError(f"prompt {i}: the dense forward pass chooses other tokens; please report this")
    waste = 1 - sum(map(len, texts)) / padded.size
    console.print(f"   so does a dense padded forward pass, whose padding wastes {waste:.0%}")


def dense_logits(model: Model, token_ids: Array) -> Float[Array, "L V"]:
    """Logits of one padded sequence with `jax.nn`'s attention: no metadata, no pages, no kernel."""
    params, config = model.params, model.config
    x = params["embed"][token_ids]
    for layer, window, rope in zip(params["layers"], config.sliding_windows, config.ropes, strict=True):
        rotation = rope_tables(rope, config.head_dim, jnp.arange(token_ids.shape[0]))
        h = rms_norm(x, layer["attention_norm"], config)
        q, k, v = (jnp.einsum("td,dnh->tnh", h, layer[name]) for name in "qkv")
        out = jax.nn.dot_product_attention(
            rotate(q, rotation),
            rotate(k, rotation),
            v,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
        x = x + jnp.einsum("tnh,nhd->td", out, layer["o"])
        h = rms_norm(x, layer["mlp_norm"], config)
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return unembed(params, config, rms_norm(x, params["final_norm"], config))


def _show_text(console: Console, prompts: list[np.ndarray], tokens: list[list[int]]) -> None:
    for prompt, new in zip(prompts, tokens, strict=True):
        given = prompt.tobytes().decode("ascii", "replace")
        written = bytes(new).decode("ascii", "replace")
        console.rule(style="dim")
        console.print(
            Text(given if len(given) < 60 else "…" + given[-59:]).append(written, style="bold green")
        )
    console.rule(style="dim")


def count_calls(jaxpr: Any, name: str) -> int:
    """How often a jitted function is called in a program, loops counted once."""
    return sum(
        (equation.params.get("name") == name)
        + sum(count_calls(inner, name) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def _show_counts(console: Console, model: Model, batch: RaggedBatch) -> None:
    """How often a step derives its metadata, counted in its program, and what recomputing would take."""
    layers, implementations = CONFIG.num_layers, len(PORTABLE)
    classes = len({spec.window_class for spec in CONFIG.layer_specs()})
    cache = init_model_cache(
        CONFIG, num_pages=batch.bucket.pages, page_size=PAGE_SIZE, dtype=model.compiled.dtype
    )
    program = jax.make_jaxpr(
        lambda params, cache, batch: step(
            params, cache, batch, config=CONFIG, num_rows=batch.bucket.seqs, implementation="auto"
        )
    )(model.params, cache, batch)
    derived = count_calls(program.jaxpr, "_prepare")
    table = Table("per step", "computed", "if every layer did", "and every implementation", box=None)
    for name, pieces in (
        ("lengths and positions", 1),
        ("slots and page list", 1),
        ("visible keys, tiles", classes),
    ):
        table.add_row(name, f"{pieces * derived}", f"{layers}", f"{layers * implementations}")
    console.print(
        f"[bold]5. Metadata:[/] derived {derived}× in the program of a step, for {layers} layers of "
        f"{classes} window classes"
    )
    console.print(table)
    console.print(
        "   Within one jit XLA merges plain recomputation by itself. It cannot in separate programs,\n"
        "   under rematerialisation, inside kernels or on the host: there this is work saved."
    )
