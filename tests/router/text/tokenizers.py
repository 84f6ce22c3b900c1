"""Small true tokenizers of the two kinds that models come with."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SAMPLE = (
    "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter "
    "Deich. いろはにほへと ちりぬるを 👩‍👩‍👧‍👦 🎉🎉 def f(x):\n    return x ** 2  # été\n"
)
TEXTS = [
    "",
    "hello world",
    "  two  spaces\t\ttabs\n\nlines ",
    "Zwölf große 👩‍👩‍👧‍👦 いろは été e\u0301 \u200d",
    SAMPLE * 3,
]


def byte_level() -> Tokenizer:
    """A byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have one, with two special tokens and one added
    token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Pieces with ▁ for spaces and a fall-back to bytes, as Llama 2 and Mistral have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzT.", "he", "▁t", "▁the", "lo", "▁wor", "ld"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("l", "o"), ("l", "d")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
