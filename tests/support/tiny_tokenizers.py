"""Tokenizers of the two kinds that decoders have, with few tokens, made by the library itself."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BEGIN, END = "<s>", "</s>"


def byte_level() -> Tokenizer:
    """As of Llama 3 and Qwen: tokens are runs of bytes. 300 tokens; 0 begins a text, 1 ends it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(["once upon a time there was a tokenizer, née 日本語"] * 3, trainer)
    return _begin(tokenizer)


def byte_fallback() -> Tokenizer:
    """As of Llama 2 and Gemma: tokens are characters; others, and none besides, are written in bytes."""
    tokens = [BEGIN, END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh.", "▁a"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _begin(tokenizer)


def _begin(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer
