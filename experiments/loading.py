"""What does it cost to load a checkpoint: ours against its own library and NumPy, and a second start?

A decoder, float32, is written in three formats: safetensors with torch's names, Flax msgpack, and Orbax. Each
is loaded as bfloat16 in two ways, in a process of its own, in turns: by `load_params`; and with the format's
own library, which brings all arrays to host memory, where NumPy brings them into our shapes and dtype, and
then to the device. Both ways must give the same bits. Files are in the page cache.

Time is from the call until the parameters are there. Memory is the most anonymous memory (`RssAnon`) of that
process, watched from another one, beyond what it had before the call: pages of mapped files do not count.
On a CPU the result itself is a part of it.

Then a model is loaded from safetensors, with the prefill and decode programs of one plan, in two processes
one after the other, with one folder of compiled programs; and each checkpoint is inspected.

Runs on Linux, and takes 2 GB on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from experiment import Experiment, Row, Table
from flax import serialization
from matplotlib.figure import Figure
from pictures import grouped_bars, white_figure
from rich.progress import track
from safetensors.numpy import load_file, save_file

from jaxattn import DecoderConfig, load_model, save_params
from jaxattn.checkpoints import config_to_dict, inspect, load_params
from jaxattn.models import init_params
from jaxattn.serving import plan_generation

MIB = 2**20
POLL_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is loaded, and how often."""

    hidden_size: int = 768
    """Width of the decoder; a head has 64."""
    num_layers: int = 12
    """Its layers."""
    vocab_size: int = 50_304
    """Its token ids; the embeddings are tied."""
    dtype: str = "bfloat16"
    """What it is loaded as."""
    formats: tuple[str, ...] = ("safetensors", "msgpack", "orbax")
    """Which formats; the first must be safetensors."""
    rounds: int = 3
    """Processes of each way to load each format."""
    prompt_lens: tuple[int, ...] = (512, 100, 12)
    """Of the plan whose programs are compiled."""
    max_new_tokens: int = 64
    """Of that plan."""

    def decoder(self) -> DecoderConfig:
        """The decoder."""
        heads = self.hidden_size // 64
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 8 // 3,
            num_layers=self.num_layers,
            num_q_heads=heads,
            num_kv_heads=heads,
            head_dim=64,
            tie_embeddings=True,
        )


def write(folder: Path, config: Config) -> None:
    """Write the checkpoint in every format, each by its own library."""
    decoder = config.decoder()
    params = jax.tree.map(np.asarray, init_params(jax.random.key(0), decoder))
    save_params(folder / "orbax", params, decoder)
    tree = _restore_orbax(folder / "orbax" / "params")
    for name in ("msgpack", "safetensors"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_to_dict(decoder)))
    (folder / "msgpack" / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    tensors = {
        re.sub(r"(kernel|embedding)$", "weight", name): array.T.copy() if name.endswith("kernel") else array
        for name, array in _flat(tree, ".").items()
    }
    save_file(tensors, folder / "safetensors" / "model.safetensors")


def _flat(tree: Any, separator: str) -> dict[str, np.ndarray]:
    paths = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): np.asarray(leaf) for path, leaf in paths
    }


def _restore_orbax(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


def read_by_library(format_name: str, folder: Path) -> Mapping[str, np.ndarray]:
    """All arrays in host memory, by the format's own library, with names as in Flax."""
    if format_name == "safetensors":
        return load_file(folder / "model.safetensors")
    if format_name == "msgpack":
        return _flat(serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes()), ".")
    return _flat(_restore_orbax(folder / "params"), ".")


def convert_in_numpy(arrays: Mapping[str, np.ndarray], config: Config) -> Any:
    """The decoder's parameters, on the device."""
    decoder = config.decoder()
    heads, hidden = decoder.head_dim, decoder.hidden_size

    def leaf(name: str) -> np.ndarray:
        """A kernel as [in, out]."""
        return arrays[name + ".kernel"] if name + ".kernel" in arrays else arrays[name + ".weight"].T

    def place(array: np.ndarray) -> jax.Array:
        return jax.device_put(np.ascontiguousarray(array).astype(jnp.dtype(config.dtype)))

    def layer(name: str) -> dict[str, jax.Array]:
        attention = {key: leaf(f"{name}.self_attn.{key}_proj").reshape(hidden, -1, heads) for key in "qkv"}
        mlp = {key: leaf(f"{name}.mlp.{key}_proj") for key in ("gate", "up", "down")}
        return jax.tree.map(
            place,
            {
                "attention_norm": arrays[f"{name}.input_layernorm.weight"],
                **attention,
                "o": leaf(f"{name}.self_attn.o_proj").reshape(-1, heads, hidden),
                "mlp_norm": arrays[f"{name}.post_attention_layernorm.weight"],
                **mlp,
            },
        )

    embed = "model.embed_tokens."
    return {
        "embed": place(arrays[embed + ("embedding" if embed + "embedding" in arrays else "weight")]),
        "layers": tuple(layer(f"model.layers.{i}") for i in range(decoder.num_layers)),
        "final_norm": place(arrays["model.norm.weight"]),
    }


def load_ours(folder: Path, config: Config) -> Any:
    """Parameters by `load_params`."""
    return jax.block_until_ready(load_params(folder, dtype=config.dtype))


def load_by_library(folder: Path, config: Config) -> Any:
    """Parameters by the format's own library and NumPy."""
    return jax.block_until_ready(convert_in_numpy(read_by_library(folder.name, folder), config))


WAYS: dict[str, Callable[[Path, Config], Any]] = {"ours": load_ours, "library and NumPy": load_by_library}


def digest(params: Any) -> str:
    """Of all leaves, bit by bit."""
    total = hashlib.sha256()
    for name, array in sorted(_flat(params, ".").items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def _work(task: str, folder: Path, config: Config) -> Callable[[], Any]:
    """What a task measures."""
    if task == "start":
        plan = plan_generation(config.prompt_lens, config.max_new_tokens)
        cache_dir = folder.parent / "compiled"
        return partial(load_model, folder, dtype=config.dtype, buckets=[plan], cache_dir=cache_dir)
    return partial(inspect, folder) if task == "inspect" else partial(WAYS[task], folder, config)


CHILD = "--child"
"""The first argument of a process that `watch` starts; no option for users."""


def child(task: str, folder: str, config: str) -> None:
    """What a process of its own does: get ready, say so, wait, work, say how long it took.

    Args:
        task: A way to load, "start" or "inspect".
        folder: The checkpoint.
        config: The configuration, as JSON.
    """
    jax.block_until_ready(jnp.zeros(8))
    run = _work(task, Path(folder), Config(**json.loads(config)))
    _say({"pid": os.getpid()})
    sys.stdin.readline()
    before, started = _bytes_read(), time.perf_counter()
    result = run()
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "bytes_read": _bytes_read() - before}
    _say(row)
    sys.stdin.readline()
    if task == "start":
        row = {"report": dataclasses.asdict(result.report)}
    elif task == "inspect":
        row = {"leaves": len(result.leaves), "num_params": result.num_params, "problems": result.problems}
    else:
        leaves = jax.tree.leaves(result)
        row = {
            "digest": digest(result),
            "result_bytes": sum(leaf.nbytes for leaf in leaves),
            "largest_leaf": max(leaf.size for leaf in leaves),
        }
    _say(row)


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _bytes_read() -> int:
    """Bytes that calls of `read` have brought to this process; what is mapped does not count."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def _anonymous(pid: int) -> int:
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def watch(task: str, folder: Path, config: Config) -> Row:
    """Run a task in a process of its own and watch its memory from here."""
    command = [sys.executable, __file__, CHILD, task, str(folder), json.dumps(dataclasses.asdict(config))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = json.loads(process.stdout.readline())["pid"]
        before = peak = _anonymous(pid)
        process.stdin.write("\n")
        while not select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            peak = max(peak, _anonymous(pid))
        line = process.stdout.readline()
        process.stdin.write("\n")
        row = json.loads(line) | json.loads(process.stdout.readline())
    return {"task": task, "format": folder.name, "extra_bytes": peak - before, **row}


def rows(config: Config) -> Iterator[Row]:
    """A row per process.

    Raises:
        RuntimeError: If two ways of loading give other bits.
    """
    loads = [(way, name) for _ in range(config.rounds) for name in config.formats for way in WAYS]
    others = [("start", config.formats[0])] * 2 + [("inspect", name) for name in config.formats]
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), config)
        for task, name in track([*loads, *others], "processes"):
            row = watch(task, Path(folder) / name, config)
            digests |= {row["digest"]} if "digest" in row else set()
            if len(digests) > 1:
                raise RuntimeError(f"{task} of {name} gives other bits than the ways before it")
            yield row


def gate(row: Row) -> int:
    """Bytes of memory that ours may take: for Orbax three results; else one, two float32 leaves, 100 MB."""
    result = row["result_bytes"]
    return 3 * result if row["format"] == "orbax" else result + 2 * 4 * row["largest_leaf"] + 100_000_000


def _by_task(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["format"], row["task"]), []).append(row)
    return found


def tables(rows: list[Row]) -> dict[str, Table]:
    """Loads, starts and inspections."""
    loads, starts, inspections = [], [], []
    for (name, task), found in _by_task(rows).items():
        memory = f"{max(row['extra_bytes'] for row in found) / MIB:.0f}"
        if task in WAYS:
            seconds = ", ".join(f"{row['seconds']:.2f}" for row in found)
            limit = f"{gate(found[0]) / MIB:.0f}" if task == "ours" else "–"
            loads.append([name, task, seconds, memory, limit])
        elif task == "inspect":
            (row,) = found
            inspections.append([name, f"{row['seconds']:.2f}", f"{row['bytes_read']:,}", memory])
        else:
            for which, row in zip(("first", "second"), found, strict=True):
                report = row["report"]
                figures = (report["compiling_seconds"], report["reading_seconds"])
                counts = (report["cache_misses"], report["cache_hits"])
                starts.append(
                    [which, f"{row['seconds']:.1f}", *(f"{s:.1f}" for s in figures), *map(str, counts)]
                )
    return {
        "loads": Table(("format", "way", "seconds, each run", "most memory, MiB", "gate, MiB"), loads),
        "starts": Table(
            ("start", "seconds", "of compiling", "of reading", "programs compiled", "found in the cache"),
            starts,
        ),
        "inspections": Table(("format", "seconds", "bytes read", "most memory, MiB"), inspections),
    }


def plot(rows: list[Row]) -> Figure:
    """Time and memory of loading, by format and way."""
    figure = white_figure("What does it cost to load a checkpoint?", 10, 3.8)
    time_axes, memory_axes = figure.subplots(1, 2)
    found = _by_task(rows)
    formats = list(dict.fromkeys(name for name, _ in found))

    def of_ways(figure_of: Callable[[list[Row]], float]) -> dict[str, list[float | None]]:
        return {way: [figure_of(found[name, way]) for name in formats] for way in WAYS}

    seconds = of_ways(lambda some: statistics.median(row["seconds"] for row in some))
    memory = of_ways(lambda some: max(row["extra_bytes"] for row in some) / MIB)
    grouped_bars(time_axes, formats, seconds, form="{:.2f}")
    grouped_bars(memory_axes, formats, memory, form="{:.0f}")
    time_axes.set(xlabel="format", ylabel="seconds, median of runs")
    memory_axes.set(xlabel="format", ylabel="most memory besides, MiB")
    memory_axes.legend(frameon=False)
    return figure


EXPERIMENT = Experiment(
    question="What does it cost to load a checkpoint, against its own library and NumPy, and a second start?",
    committed=Config(),
    small=Config(
        hidden_size=64,
        num_layers=1,
        vocab_size=64,
        formats=("safetensors",),
        rounds=1,
        prompt_lens=(9,),
        max_new_tokens=2,
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(*sys.argv[2:])
    else:
        EXPERIMENT.main(__file__)
