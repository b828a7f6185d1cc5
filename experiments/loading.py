"""What does it cost to load a checkpoint: ours against its own library and NumPy, and a second start?

    python experiments/loading.py

A decoder of 124 M parameters, float32, is written in three formats: safetensors with torch's names, Flax
msgpack, and Orbax. Each is loaded as bfloat16 in two ways, in a process of its own, in turns: by
`load_params`; and with the format's own library, which brings all arrays to host memory, where NumPy brings
them into our shapes and dtype, and then to the device. Both ways must give the same bits. Files are in the
page cache.

Time is from the call until the parameters are there. Memory is the most anonymous memory (`RssAnon`) of that
process, watched from another one, beyond what it had before the call: pages of mapped files do not count.
On a CPU the result itself is a part of it.

Then a model is loaded from safetensors, with the prefill and decode programs of one plan, in two processes
one after the other, with one folder of compiled programs; and each checkpoint is inspected.

Writes `experiments/results/loading.json` with provenance. Runs on Linux, and takes 2 GB on disk.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file, save_file
from side_by_side import provenance

from jaxattn import DecoderConfig, load_model, plan_generation, save_params
from jaxattn.checkpoints import config_to_dict, inspect, load_params
from jaxattn.models import init_params

RESULTS = Path(__file__).parent / "results" / "loading.json"
FORMATS = ("safetensors", "msgpack", "orbax")
MIB = 2**20
POLL_SECONDS = 0.002


MODEL = DecoderConfig(
    vocab_size=50_304,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_q_heads=12,
    num_kv_heads=12,
    head_dim=64,
    tie_embeddings=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is loaded, and how often.

    Attributes:
        model: The decoder.
        dtype: What it is loaded as.
        rounds: Processes of each way to load each format.
        prompt_lens: Of the plan whose programs are compiled.
        max_new_tokens: Of that plan.
    """

    model: DecoderConfig = MODEL
    dtype: str = "bfloat16"
    rounds: int = 3
    prompt_lens: tuple[int, ...] = (512, 100, 12)
    max_new_tokens: int = 64


SETTING = Setting()


def write(folder: Path, setting: Setting) -> None:
    """Write the checkpoint in every format, each by its own library."""
    config = setting.model
    params = jax.tree.map(np.asarray, init_params(jax.random.key(0), config))
    save_params(folder / "orbax", params, config)
    tree = _restore_orbax(folder / "orbax" / "params")
    for name in ("msgpack", "safetensors"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_to_dict(config)))
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


def convert_in_numpy(arrays: Mapping[str, np.ndarray], setting: Setting) -> Any:
    """The decoder's parameters, on the device."""
    config = setting.model
    heads, hidden = config.head_dim, config.hidden_size

    def leaf(name: str) -> np.ndarray:
        """A kernel as [in, out]."""
        return arrays[name + ".kernel"] if name + ".kernel" in arrays else arrays[name + ".weight"].T

    def place(array: np.ndarray) -> jax.Array:
        return jax.device_put(np.ascontiguousarray(array).astype(jnp.dtype(setting.dtype)))

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
        "layers": tuple(layer(f"model.layers.{i}") for i in range(config.num_layers)),
        "final_norm": place(arrays["model.norm.weight"]),
    }


def load_ours(folder: Path, setting: Setting) -> Any:
    """Parameters by `load_params`."""
    return jax.block_until_ready(load_params(folder, dtype=setting.dtype))


def load_by_library(folder: Path, setting: Setting) -> Any:
    """Parameters by the format's own library and NumPy."""
    return jax.block_until_ready(convert_in_numpy(read_by_library(folder.name, folder), setting))


WAYS: dict[str, Callable[[Path, Setting], Any]] = {"ours": load_ours, "library and NumPy": load_by_library}


def digest(params: Any) -> str:
    """Of all leaves, bit by bit."""
    total = hashlib.sha256()
    for name, array in sorted(_flat(params, ".").items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def _work(task: str, folder: Path, setting: Setting) -> Callable[[], Any]:
    """What a task measures."""
    if task == "start":
        plan = plan_generation(setting.prompt_lens, setting.max_new_tokens)
        cache_dir = folder.parent / "compiled"
        return partial(load_model, folder, dtype=setting.dtype, buckets=[plan], cache_dir=cache_dir)
    return partial(inspect, folder) if task == "inspect" else partial(WAYS[task], folder, setting)


def child(task: str, folder: Path, setting: Setting) -> None:
    """What a process of its own does: get ready, say so, wait, work, say how long it took."""
    jax.block_until_ready(jnp.zeros(8))
    run = _work(task, folder, setting)
    _say({"pid": os.getpid()})
    sys.stdin.readline()
    before, started = _bytes_read(), time.perf_counter()
    result = run()
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "bytes_read": _bytes_read() - before}
    _say(row)
    sys.stdin.readline()
    if task == "start":
        row = {"report": asdict(result.report)}
    elif task == "inspect":
        row = {"leaves": len(result.leaves), "num_params": result.num_params, "problems": result.problems}
    else:
        row = {"digest": digest(result), "result_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(result))}
    _say(row)


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _bytes_read() -> int:
    """Bytes that calls of `read` have brought to this process; what is mapped does not count."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def _anonymous(pid: int) -> int:
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def watch(task: str, folder: Path) -> dict[str, Any]:
    """Run a task in a process of its own and watch its memory from here."""
    command = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
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


def gates(rows: list[dict[str, Any]], largest_leaf: int) -> dict[str, dict[str, Any]]:
    """Per format, the extra memory that ours may take, and took at most."""
    ours = [row for row in rows if row["task"] == "ours"]
    result = ours[0]["result_bytes"]
    limits: dict[str, int] = dict.fromkeys(
        ("safetensors", "msgpack"), result + 2 * largest_leaf + 100_000_000
    )
    limits["orbax"] = 3 * result
    taken = {name: max(row["extra_bytes"] for row in ours if row["format"] == name) for name in FORMATS}
    return {
        name: {"limit": limits[name], "taken": taken[name], "kept": taken[name] <= limits[name]}
        for name in FORMATS
    }


def run(folder: Path, setting: Setting) -> dict[str, Any]:
    """Everything that is measured."""
    write(folder, setting)
    tasks = [(task, name) for _ in range(setting.rounds) for name in FORMATS for task in WAYS]
    rows = [watch(task, folder / name) for task, name in track(tasks, "loading")]
    if len({row["digest"] for row in rows}) != 1:
        raise RuntimeError("ours and the libraries give other bits")
    return {
        "loads": rows,
        "gates": gates(rows, 4 * setting.model.vocab_size * setting.model.hidden_size),
        "starts": [watch("start", folder / "safetensors") for _ in range(2)],
        "inspections": [watch("inspect", folder / name) for name in FORMATS],
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table("format", "way", "seconds", "extra MiB", "of which result")
    for name in FORMATS:
        for task in WAYS:
            rows = [row for row in found["loads"] if (row["format"], row["task"]) == (name, task)]
            table.add_row(
                name,
                task,
                f"{statistics.median(row['seconds'] for row in rows):.2f}",
                f"{statistics.median(row['extra_bytes'] for row in rows) / MIB:.0f}",
                f"{rows[0]['result_bytes'] / MIB:.0f}",
            )
    console.print(table)
    for name, gate in found["gates"].items():
        kept = "kept" if gate["kept"] else "NOT KEPT"
        console.print(f"{name}: {gate['taken'] / MIB:.0f} of {gate['limit'] / MIB:.0f} MiB, {kept}")
    for number, row in enumerate(found["starts"], 1):
        report = row["report"]
        console.print(
            f"start {number}: {row['seconds']:.2f} s, {report['cache_misses']} programs compiled, "
            f"{report['cache_hits']} found; {report['compiling_seconds']:.2f} s of compiling"
        )
    for row in found["inspections"]:
        console.print(
            f"inspect {row['format']}: {row['seconds']:.3f} s, {row['bytes_read']:,} bytes read, "
            f"{row['extra_bytes'] / MIB:.1f} MiB more memory"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        child(arguments.task, arguments.folder, SETTING)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), SETTING)
    show(Console(width=110), found)
    written = {"provenance": provenance(), "setting": asdict(SETTING), **found}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
