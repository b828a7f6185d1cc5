"""The command `generate`: prompts as text or token ids; what follows them, at the end or as it comes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.trace import BatchLog
from jaxattn.cache.paged import DEFAULT_PAGE_SIZE
from jaxattn.cache.quantization import QUANTIZED_DTYPES
from jaxattn.cli.choices import implementation_of
from jaxattn.cli.load import load
from jaxattn.models import CompiledSteps, Sampling
from jaxattn.models.options import PromptOptions, limits_per_prompt
from jaxattn.models.sampling import NUM_SEEDS
from jaxattn.serving.generate import generate
from jaxattn.serving.sizes import compile_generation, fits_one_batch, plan_generation
from jaxattn.serving.text import Tokenizer, load_tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_KEYS = ("prompt", "prompt_ids", "max_new_tokens", "stop_token_ids", *_SAMPLING)


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.epilog = f"A line of --prompts-file is a JSON object with some of the keys {', '.join(_KEYS)}."
    add = parser.add_argument
    for option, metavar, meaning in (
        ("--prompt", "TEXT", "a prompt, if there is a tokenizer.json; once per prompt"),
        ("--prompt-ids", "IDS", 'token ids of a prompt, such as "1 5 9"; once per prompt'),
        ("--prompts-file", "FILE", "a prompt per line, with options of its own (see below)"),
    ):
        given = functools.partial(_Given, option)
        add(option, dest="prompts", action="append", type=given, metavar=metavar, help=meaning)
    add("--max-new-tokens", type=int, metavar="N", required=True, help="most tokens to add to each prompt")
    add("--temperature", type=float, metavar="T", default=0.0, help="0 (the default) is the likeliest token")
    add("--top-k", type=int, metavar="N", help="draw among this many likeliest tokens")
    add("--top-p", type=float, metavar="P", default=1.0,
        help="draw among the likeliest tokens that together have this probability")  # fmt: skip
    add("--seed", type=int, metavar="N", default=0, help="of the first prompt's draws; 1 more for each next")
    add("--stop-token-id", type=int, metavar="ID", action="append",
        help="a prompt ends with this token; once per token; "
             "default: for text, those that the checkpoint names")  # fmt: skip
    add("--num-pages", type=int, metavar="N",
        help="most pages of the cache; prompts that do not fit run in continuous batches")  # fmt: skip
    add("--page-size", type=int, metavar="N", default=DEFAULT_PAGE_SIZE, help="tokens per cache page")
    add("--cache-dtype", choices=QUANTIZED_DTYPES, metavar="DTYPE",
        help=f"quantised cache, its scales measured on the prompts: {', '.join(QUANTIZED_DTYPES)}; "
             f"default: as the parameters")  # fmt: skip
    add("--log-batches", type=Path, metavar="FILE",
        help="add the sizes of each batch to this file, for `jaxattn buckets`")  # fmt: skip
    add("--stream", action="store_true", help="print new tokens as they come")
    add("--json", action="store_true", help="print one JSON object; with --stream, one per line")


def run_generate(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: What was parsed.

    Raises:
        ValueError: If a prompt or an option is out of range.
        CheckpointError: If the checkpoint cannot be loaded.
    """
    prompts = _read_prompts(options.prompts or ())
    with_text = any(isinstance(prompt.content, str) for prompt in prompts)
    tokenizer = load_tokenizer(options.path) if with_text else None
    token_ids = [_encode(prompt, tokenizer) for prompt in prompts]
    asked = _options_per_prompt(prompts, options, tokenizer)
    implementation = implementation_of(options)
    model = load(options, *_buckets(options, token_ids, asked, implementation))
    stream = _Stream(token_ids, tokenizer, as_json=options.json) if options.stream else None
    with contextlib.nullcontext() if options.log_batches is None else BatchLog(options.log_batches) as log:
        tokens = generate(
            model,
            token_ids,
            [one.max_new_tokens for one in asked],
            sampling=[one.sampling for one in asked],
            stop_token_ids=[one.stop_token_ids for one in asked],
            on_tokens=stream,
            num_pages=options.num_pages,
            cache_dtype=options.cache_dtype,
            implementation=implementation,
            page_size=options.page_size,
            log=log,
        )
    if stream is not None:
        stream.finish()
    else:
        _print_all(token_ids, tokens, tokenizer, as_json=options.json)


def parse_prompt_ids(text: str, number: int) -> list[int]:
    """The token ids of a `--prompt-ids`.

    Args:
        text: Its words.
        number: Which prompt it is.

    Raises:
        ValueError: If they are no integers, or none.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError(f"--prompt-ids {text!r} (prompt {number}) is empty; give at least one token id")
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(
            f"--prompt-ids {text!r} (prompt {number}) must be integers separated by spaces"
        ) from None


class _Given(NamedTuple):
    """An option that gives prompts."""

    option: str
    value: str


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as it was given.

    Attributes:
        place: Where, for errors.
        content: A text, or token ids.
        options: Its own, by their keys in a file.
    """

    place: str
    content: str | list[int]
    options: dict[str, Any] = field(default_factory=dict)


def _read_prompts(given: Sequence[_Given]) -> list[_Prompt]:
    """All prompts, in the order in which they were given."""
    if not given:
        raise ValueError("there is no prompt; give --prompt, --prompt-ids or --prompts-file")
    prompts: list[_Prompt] = []
    for option, value in given:
        if option == "--prompts-file":
            prompts.extend(_read_file(Path(value)))
        elif option == "--prompt":
            prompts.append(_Prompt("--prompt", value))
        else:
            prompts.append(_Prompt("--prompt-ids", parse_prompt_ids(value, len(prompts))))
    return prompts


def _read_file(file: Path) -> list[_Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {file} cannot be read: {error}") from None
    prompts = [_read_line(f"{file}:{i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {file} holds no prompt; give one JSON object per line")
    return prompts


def _read_line(place: str, line: str) -> _Prompt:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f'{place}: {line.strip()[:40]} is no object; write {{"prompt": "text"}}')
    if unknown := sorted(values.keys() - set(_KEYS)):
        raise ValueError(f"{place}: unknown key {unknown[0]!r}; use {', '.join(_KEYS)}")
    text, token_ids = values.pop("prompt", None), values.pop("prompt_ids", None)
    if (text is None) == (token_ids is None):
        raise ValueError(f"{place}: give one of prompt and prompt_ids")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: prompt={text!r} must be a string")
    for name, ids in (("prompt_ids", token_ids), ("stop_token_ids", values.get("stop_token_ids"))):
        if ids is not None and not (isinstance(ids, list) and all(type(entry) is int for entry in ids)):
            raise ValueError(f"{place}: {name}={ids!r} must be a list of token ids")
    if "max_new_tokens" in values and type(values["max_new_tokens"]) is not int:
        raise ValueError(f"{place}: max_new_tokens={values['max_new_tokens']!r} must be an integer")
    return _Prompt(place, token_ids if text is None else text, values)


def _encode(prompt: _Prompt, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt.content, list):
        return prompt.content
    assert tokenizer is not None  # it is loaded if a prompt is a text
    return tokenizer.encode(prompt.content)


def _options_per_prompt(
    prompts: Sequence[_Prompt], options: argparse.Namespace, tokenizer: Tokenizer | None
) -> list[PromptOptions]:
    """What is asked for each prompt: its own options, else those of the command."""
    shared = Sampling(**{name: getattr(options, name) for name in _SAMPLING})
    limits_per_prompt(1, options.max_new_tokens)
    asked = []
    for i, prompt in enumerate(prompts):
        own = prompt.options
        sampling = {"seed": (shared.seed + i) % NUM_SEEDS}
        sampling |= {name: own[name] for name in _SAMPLING if name in own}
        from_text = tokenizer.stop_token_ids if tokenizer and isinstance(prompt.content, str) else ()
        stops = own.get("stop_token_ids", options.stop_token_id or from_text)
        try:
            (limit,) = limits_per_prompt(1, own.get("max_new_tokens", options.max_new_tokens))
            asked.append(PromptOptions(limit, dataclasses.replace(shared, **sampling), tuple(stops)))
        except ValueError as error:
            raise ValueError(f"{prompt.place}: {error}") from None
    return asked


def _buckets(
    options: argparse.Namespace,
    token_ids: Sequence[list[int]],
    asked: Sequence[PromptOptions],
    implementation: str | ChoiceTable,
) -> list[Callable[[CompiledSteps], None]]:
    """What compiles, while the weights are being read, all that `generate` will run in one batch."""
    lens, limits = [len(ids) for ids in token_ids], [one.max_new_tokens for one in asked]
    sizes = {"num_pages": options.num_pages, "page_size": options.page_size}
    if not fits_one_batch(lens, limits, **sizes):
        return []
    num_stop_tokens = max(len(one.stop_token_ids) for one in asked)
    plan = plan_generation(lens, limits, num_stop_tokens=num_stop_tokens, **sizes)

    def compile_run(compiled: CompiledSteps) -> None:
        compile_generation(
            compiled,
            plan,
            greedy=all(one.sampling.temperature == 0 for one in asked),
            cache_dtype=options.cache_dtype,
            implementation=implementation,
        )
        if options.cache_dtype:
            compiled.calibrate(
                dataclasses.replace(plan.bucket, pages=0),
                cache_dtype=options.cache_dtype,
                implementation=implementation,
            )

    return [compile_run]


def _print_all(
    prompts: Sequence[list[int]], tokens: Sequence[list[int]], tokenizer: Tokenizer | None, *, as_json: bool
) -> None:
    texts = None
    if tokenizer is not None:
        texts = [tokenizer.decode(new, after=prompt) for prompt, new in zip(prompts, tokens, strict=True)]
    if as_json:
        print(json.dumps({"tokens": tokens} if texts is None else {"tokens": tokens, "texts": texts}))
        return
    for i, new in enumerate(tokens):
        print(f"{i}: {_words(new) if texts is None else texts[i]}")


def _words(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


class _Stream:
    """Prints new tokens as they come: of one prompt one after the other, of several a line each time."""

    def __init__(self, prompts: Sequence[list[int]], tokenizer: Tokenizer | None, *, as_json: bool) -> None:
        self._as_json = as_json
        self._is_alone = len(prompts) == 1
        self._texts = None if tokenizer is None else [tokenizer.stream(after=prompt) for prompt in prompts]

    def __call__(self, prompt: int, token_ids: list[int]) -> None:
        self._print(prompt, token_ids, None if self._texts is None else self._texts[prompt].push(token_ids))

    def finish(self) -> None:
        """Print what is held back."""
        for i, text in enumerate(self._texts or ()):
            if rest := text.finish():
                self._print(i, [], rest)
        if self._is_alone and not self._as_json:
            print()

    def _print(self, prompt: int, token_ids: list[int], text: str | None) -> None:
        if self._as_json:
            values = {"prompt": prompt, "tokens": token_ids}
            print(json.dumps(values if text is None else {**values, "text": text}), flush=True)
        elif self._is_alone:
            print(f"{_words(token_ids)} " if text is None else text, end="", flush=True)
        elif text != "":
            print(f"{prompt}: {_words(token_ids) if text is None else text}", flush=True)
