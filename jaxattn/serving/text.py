"""Text in and text out, by the `tokenizer.json` that lies beside a checkpoint's weights.

tokenizer = load_tokenizer("path/to/checkpoint")
prompt = tokenizer.encode("Once upon a time")
(tokens,) = generate(model, [prompt], 64, stop_token_ids=tokenizer.stop_token_ids)
text = tokenizer.decode(tokens, after=prompt)

It needs the package `tokenizers`: `pip install "jaxattn[text]"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"

# Where Hugging Face's checkpoints name the tokens that end a text, the first that does so.
_CONFIGS = ("generation_config.json", "config.json")

# What an incomplete character is decoded to.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Token ids of texts and texts of token ids.

    Args:
        tokenizer: As the file says it.
        stop_token_ids: The tokens that end a text.

    Attributes:
        stop_token_ids: The tokens that end a text, as the checkpoint's configs name them; empty if none does.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop_token_ids: Sequence[int] = ()) -> None:
        # A file may carry the limits of training, and prompts would be cut or padded silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the file adds, such as one at the beginning.

        Args:
            text: A prompt.

        Raises:
            ValueError: If the text has no tokens.
        """
        token_ids = self._tokenizer.encode(text).ids
        if not token_ids:
            raise ValueError(f"the text {text!r} has no tokens; give a longer one")
        return token_ids

    def decode(self, token_ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of token ids, without special tokens.

        Args:
            token_ids: The tokens of one sequence, such as `generate` returns.
            after: The tokens before them, such as the prompt's: at the beginning of a text, some tokenizers
                drop a space.
        """
        if not after:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)
        known, text = self.decode(after), self.decode([*after, *token_ids])
        # Where bytes stand for themselves, an incomplete character spoils those before it as well.
        return text.removeprefix(known) if text.startswith(known) else self.decode(token_ids)

    def stream(self, *, after: Sequence[int] = ()) -> TextStream:
        """Decodes the tokens of one sequence as they come.

        Args:
            after: The tokens before those that come, such as the prompt's.
        """
        return TextStream(self, after)


class TextStream:
    """The text of a sequence whose tokens come one after the other.

    A character whose tokens have not all come is held back. What `push` and `finish` return, joined, is
    what `decode` makes of all tokens, as long as the bytes among them are whole characters.

    It is not `tokenizers.decoders.DecodeStream`, which raises where bytes are no text and a later token
    replaces them all (a model that has learned little writes such bytes), says the prompt again where that
    ends within a character, and cannot tell what it holds back when no more tokens come.

    Args:
        tokenizer: The tokenizer of the sequence.
        after: The tokens before those that come.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is known, as far back as the next ones' text depends on them; and those that
        # are held back.
        self._context = list(after)
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens.

        Args:
            token_ids: One or more.

        Returns:
            The text that is new with them; empty while a character is incomplete.
        """
        self._held.extend(token_ids)
        text = self._tokenizer.decode(self._held, after=self._context)
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._held = self._held, []
        return text

    def finish(self) -> str:
        """No more tokens come.

        Returns:
            What is held back; an incomplete character is a replacement character.
        """
        text = self._tokenizer.decode(self._held, after=self._context)
        self._held = []
        return text


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: A `tokenizer.json`; or a checkpoint that `load_model` reads, with one in its folder or in the
            folder above.

    Raises:
        ModuleNotFoundError: If the package `tokenizers` is not installed.
        ValueError: If there is no `tokenizer.json`, or it or a config beside it cannot be read.
    """
    try:
        from tokenizers import Tokenizer as HuggingFaceTokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'text needs the package tokenizers; install it with: pip install "jaxattn[text]"'
        ) from None
    file = _find(Path(path).expanduser().absolute())
    try:
        tokenizer = HuggingFaceTokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from None
    return Tokenizer(tokenizer, _stop_token_ids(file.parent))


def _find(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.name == TOKENIZER:
        return path
    folder = path if path.is_dir() else path.parent
    places = [folder / TOKENIZER, folder.parent / TOKENIZER]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"no {TOKENIZER} beside the weights at {path}; looked for {places[0]} and {places[1]}. Put the "
        f"model's own there, or give token ids instead of text"
    )


def _stop_token_ids(folder: Path) -> tuple[int, ...]:
    for name in _CONFIGS:
        if (folder / name).is_file():
            found = _read_config(folder / name).get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if found is not None:
                return _check_ids(folder / name, ids)
    return ()


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    # A model with images may keep the decoder's values on their own.
    text = config.get("text_config")
    return {**(text if isinstance(text, dict) else {}), **config}


def _check_ids(file: Path, ids: list[Any]) -> tuple[int, ...]:
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"{file}: eos_token_id={ids!r} must be a token id, or a list of them")
    return tuple(ids)
