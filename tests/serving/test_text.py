"""Text in and out: special tokens, whole characters as tokens come, and where the files are found."""

import json
import sys

import hypothesis.strategies as st
import pytest
import tiny_tokenizers
from hypothesis import assume, example, given

from jaxattn import load_tokenizer
from jaxattn.serving.text import Tokenizer

BYTE_LEVEL = Tokenizer(tiny_tokenizers.byte_level())
BYTE_FALLBACK = Tokenizer(tiny_tokenizers.byte_fallback())
both = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["level", "fallback"])
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@both
def test_there_and_back(tokenizer):
    for text in ("once upon a time", "日本語 née 🦜🏴‍☠️", " a  b\n\t", "</s>", "é"):
        token_ids = tokenizer.encode(text)
        assert token_ids[0] == 0, "the file adds a special token at the beginning"
        assert tokenizer.decode(token_ids) == text.replace("</s>", "")
        assert tokenizer.decode([0, *token_ids, 1, 0]) == text.replace("</s>", "")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=20)


@both
@given(texts, st.lists(st.integers(1, 5), min_size=1, max_size=5))
@example("🏴‍☠️é日 a", [1])
def test_pieces_are_whole_characters_and_the_whole_text(tokenizer, text, sizes):
    token_ids = [*tokenizer.encode(text), 1]
    stream, pieces, start = tokenizer.stream(), [], 0
    while start < len(token_ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(token_ids[start : start + size]))
        start += size
    assert all(REPLACEMENT not in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(token_ids)


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_are_streamed_as_they_are_decoded(token_ids):
    stream = BYTE_LEVEL.stream()
    pieces = [stream.push([token_id]) for token_id in token_ids]
    assert "".join([*pieces, stream.finish()]) == BYTE_LEVEL.decode(token_ids)


@both
@given(texts, st.integers(0, 30))
def test_what_follows_a_prompt(tokenizer, text, cut):
    """As it would stand behind the prompt: also where the text of the new tokens begins with a space."""
    token_ids = tokenizer.encode(text)
    prompt = token_ids[:cut]
    assume(REPLACEMENT not in tokenizer.decode(prompt))
    stream = tokenizer.stream(after=prompt)
    pieces = [stream.push([token_id]) for token_id in token_ids[cut:]]
    assert tokenizer.decode(prompt) + "".join([*pieces, stream.finish()]) == tokenizer.decode(token_ids)
    following = tokenizer.decode(token_ids[cut:], after=prompt)
    assert tokenizer.decode(prompt) + following == tokenizer.decode(token_ids)


@given(st.lists(st.integers(3, 268), max_size=12))
@example([ord("O") + 3, 0xE6 + 3, 260])  # a byte that is a character, one that begins another, and "a"
def test_bytes_that_are_no_text_stop_no_stream(token_ids):
    """As a model that has learned little writes them; what follows is streamed as if they were not there."""
    stream = BYTE_FALLBACK.stream()
    for token_id in token_ids:
        stream.push([token_id])
    stream.finish()
    following = BYTE_FALLBACK.encode("ab日")[2:]
    pieces = [stream.push([token_id]) for token_id in following]
    assert "".join([*pieces, stream.finish()]).endswith("b日")


@both
def test_a_prompt_that_ends_within_a_character_is_not_said_again(tokenizer):
    *prompt, last = tokenizer.encode("ab🦜")
    assert "ab" not in tokenizer.stream(after=prompt).push([last, *tokenizer.encode("c")[1:]])


def test_a_space_at_the_beginning():
    prompt, new = BYTE_FALLBACK.encode("ab"), BYTE_FALLBACK.encode("c")[1:]
    assert BYTE_FALLBACK.decode(new) == "c"
    assert BYTE_FALLBACK.decode(new, after=prompt) == " c"
    assert BYTE_FALLBACK.stream(after=prompt).push(new) == " c"


@both
def test_text_comes_as_early_as_it_can(tokenizer):
    stream = tokenizer.stream()
    pieces = [stream.push([token_id]) for token_id in tokenizer.encode("ab日")]
    assert pieces[-3:] in (["", "", "日"], ["b", "", "日"])
    assert "".join(pieces) == "ab日"


@both
def test_an_incomplete_character_at_the_end(tokenizer):
    token_ids = tokenizer.encode("é🦜")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push([token_id]) for token_id in token_ids) == "é"
    assert set(stream.finish()) == {REPLACEMENT}
    assert stream.finish() == ""


@pytest.fixture
def checkpoint(tmp_path):
    tiny_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_found_beside_the_weights(checkpoint):
    step = checkpoint / "10"
    step.mkdir()
    weights = checkpoint / "model.safetensors"
    weights.touch()
    for path in (checkpoint, str(checkpoint), checkpoint / "tokenizer.json", step, weights):
        assert load_tokenizer(path).encode("time") == BYTE_LEVEL.encode("time")


def test_neither_cut_nor_padded(checkpoint):
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert load_tokenizer(checkpoint).encode("z" * 9) == BYTE_LEVEL.encode("z" * 9)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        (None, {"eos_token_id": 1}, (1,)),
        ({"eos_token_id": [1, 7]}, {"eos_token_id": 1}, (1, 7)),
        ({"top_k": 3}, {"eos_token_id": [5]}, (5,)),
        ({}, {"eos_token_id": None, "bos_token_id": 2}, ()),
        (None, {"text_config": {"eos_token_id": 4}}, (4,)),
    ],
)
def test_tokens_that_end_a_text(checkpoint, generation, config, expected):
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (checkpoint / name).write_text(json.dumps(values))
    assert load_tokenizer(checkpoint).stop_token_ids == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json cannot be read as a tokenizer: Model missing"),
        ("config.json", "{", "config.json cannot be read as JSON"),
        ("config.json", "3", "config.json holds no JSON object"),
        ("config.json", '{"eos_token_id": "</s>"}', r"eos_token_id=\['</s>'\] must be a token id, or a list"),
    ],
)
def test_damaged_files(checkpoint, name, text, message):
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(checkpoint)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer.json beside the weights at {tmp_path}; looked for"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="none does not exist"):
        load_tokenizer(tmp_path / "none")


def test_a_text_without_tokens(checkpoint):
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.post_processor = None
    with pytest.raises(ValueError, match="the text '' has no tokens; give a longer one"):
        Tokenizer(tokenizer).encode("")


def test_without_the_package(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jaxattn\[text\]"'):
        load_tokenizer(checkpoint)
