"""Texts to ids, by a `tokenizer.json` and the library that wrote it (`tokenizers`)."""

import collections
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

FILE = "tokenizer.json"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # Ids 0, 1 and 2 of T5's vocabularies.


def parse(text: str, where):
    """The `tokenizers.Tokenizer` that the text of a tokenizer.json describes.

    Raises:
        ValueError: it describes none, or one that ends texts without a token of its own.
    """
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises its base class alone.
        raise ValueError(f"{where} is no {FILE} of the library tokenizers: {error}") from error
    found.no_truncation()
    found.no_padding()
    if not found.encode("").ids:
        raise ValueError(f"{where} does not end a text with a token such as {END}")
    return found


def ids_of(tokenizer, prompts: Sequence[str], max_length: int) -> list[list[int]]:
    """The ids of each prompt; a longer one keeps its first ids and the last, the end of the text.

    Warns of what is cut.

    Raises:
        ValueError: `prompts` is no list of texts, or empty.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts are {prompts!r:.100}: must be a list of at least one text")
    found = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    for prompt, ids in zip(prompts, found):
        if len(ids) > max_length:
            warnings.warn(
                f"the prompt {prompt[:40]!r}… has {len(ids)} tokens: the first {max_length - 1} "
                "and the end of the text are used",
                stacklevel=4,
            )
    return [cut(ids, max_length) for ids in found]


def cut(ids: list[int], length: int) -> list[int]:
    """At most so many ids: the first ones and the last."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple:
    """(ids int32 [B, length], mask bool [B, length], False at padding)."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask


def train(captions: Iterable[str], vocab_size: int) -> str:
    """The text of a new tokenizer.json, learned from captions.

    Byte-pair encoding of the bytes of lower-cased, NFKC-normalised words, so any text has ids;
    special tokens as in T5. The same captions give the same text.

    Args:
        captions: at least one.
        vocab_size: number of ids at most, from 259 on: the special tokens and every byte.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < 259:
        raise ValueError(f"vocab_size={vocab_size}: 3 special tokens and 256 bytes need 259")
    made = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counts = collections.Counter(captions)
    made.train_from_iterator((c for c in sorted(counts) for _ in range(counts[c])), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, made.token_to_id(END))]
    )
    return made.to_str()
