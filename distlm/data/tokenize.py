"""Tokenizers: training one from text, loading an existing one, and turning documents into token ids."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import repeat

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distlm.errors import InputError, Problem

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Bounds on what is in memory at once. An encoding takes some 100 bytes for each token.
_SLICE_CHARACTERS = 2**17
_BATCH_CHARACTERS = 2**20
_MAX_DISTINCT_CHUNKS = 2**18

# Rust threads share the work of a batch; the library switches them off in forked processes unless it is told so.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, lowercase: bool, max_seq_length: int
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer in BERT's way (Devlin et al. 2019), special tokens first: [PAD] is 0, [MASK] is 4.

    The vocabulary has at most `vocab_size` tokens, fewer where the text yields no more; of a script with too many
    characters, the rarest stay unknown. The same documents give the same tokenizer, byte for byte. Raises InputError
    where the documents hold no text.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    word_counts = _count_words(documents, normalizer, pre_tokenizers.BertPreTokenizer())
    if not word_counts:
        raise InputError("the training sources hold no text to train a tokenizer from")
    vocabulary = _learn_vocabulary(word_counts, vocab_size)

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_seq_length,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
    )


def _count_words(
    documents: Iterable[str], normalizer: normalizers.Normalizer, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> Counter[str]:
    """How often each pre-token occurs. Text between blanks is counted raw first, so that the normalizer and the
    pre-tokenizer, which look at nothing beyond it, see each distinct piece once."""
    words: Counter[str] = Counter()
    chunks: Counter[str] = Counter()

    def count_words_of_chunks() -> None:
        for chunk, count in chunks.items():
            for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(chunk)):
                words[word] += count
        chunks.clear()

    for document in documents:
        chunks.update(document.split())
        if len(chunks) > _MAX_DISTINCT_CHUNKS:
            count_words_of_chunks()
    count_words_of_chunks()
    return words


def _learn_vocabulary(word_counts: Counter[str], vocab_size: int) -> dict[str, int]:
    """The library's trainer, made deterministic.

    It numbers the tokens of single characters within words ("##a") in the order of a hash table, and breaks ties
    between merges by these numbers (huggingface/tokenizers issue 1794). Here all of them are given to it as special
    tokens, in a fixed order; so is the alphabet, which it would cut to size in the order of a hash table too.
    """
    starts, continuations = _alphabet(word_counts, vocab_size - len(SPECIAL_TOKENS))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{character}" for character in continuations],
        initial_alphabet=starts,
        limit_alphabet=len(starts),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_text_with(word_counts), trainer)
    return tokenizer.get_vocab()


def _text_with(word_counts: Counter[str]) -> Iterator[str]:
    """Text in which each word stands as often as it was counted; the trainer takes no counts."""
    max_count = 10_000
    for word, count in sorted(word_counts.items()):
        for start in range(0, count, max_count):
            yield " ".join(repeat(word, min(max_count, count - start)))


def _alphabet(word_counts: Counter[str], max_tokens: int) -> tuple[list[str], list[str]]:
    """The characters of the words, and those of them that occur within words, sorted; together at most `max_tokens`.
    Whole characters are left out, the rarest first."""
    counts: Counter[str] = Counter()
    within: set[str] = set()
    for word, count in word_counts.items():
        for character in word:
            counts[character] += count
        within.update(word[1:])
    kept = []
    for character in sorted(counts, key=lambda character: (-counts[character], character)):
        max_tokens -= 2 if character in within else 1
        if max_tokens < 0:
            break
        kept.append(character)
    return sorted(kept), sorted(within.intersection(kept))


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """An existing tokenizer from a folder or the Hub.

    Raises InputError where it cannot be loaded, is not a fast one, or lacks what masked language modelling needs.
    """
    key = "tokenizer.name_or_path"
    if name_or_path.startswith((os.sep, ".", "~")) and not os.path.isdir(name_or_path):
        raise InputError(Problem("no such folder", key, name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the loader raises whatever a broken file makes its parts raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(Problem(f"the tokenizer cannot be loaded: {reason}", key, name_or_path)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        message = "it is not a fast tokenizer (it has no tokenizer.json); use one that is, or tokenizer.train"
        raise InputError(Problem(message, key, name_or_path))
    missing = [name for name in ("mask_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        message = f"it has no {' and no '.join(missing)}, which masked language modelling needs; use another tokenizer"
        raise InputError(Problem(message, key, name_or_path))
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that decides token ids."""
    special_ids = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    content = f"{tokenizer.backend_tokenizer.to_str()}\n{special_ids}\n{tokenizer.pad_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()


def token_ids(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[tuple[list[int], bool]]:
    """The ids of the documents without special tokens, as (ids of a slice, whether it ends its document).

    A document is one slice unless it is very long. What looks like a special token in the text is text here: no
    document brings in a [MASK] of its own. Memory is bounded, whatever the length of the documents.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for batch in _batches(piece for document in documents for piece in _slices(document)):
        encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, batch, strict=True):
            yield encoding.ids, is_last


def _batches(slices: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    num_characters = 0
    for piece in slices:
        batch.append(piece)
        num_characters += len(piece[0]) + 100  # very short documents cost memory too
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _slices(document: str) -> Iterator[tuple[str, bool]]:
    """Slices of at most _SLICE_CHARACTERS, and whether each is the last. Cuts are made before a blank, which tokenizers
    that mark the beginning of a word take with the word; text without blanks is cut at the limit."""
    start = 0
    while len(document) - start > _SLICE_CHARACTERS:
        limit = start + _SLICE_CHARACTERS
        end = next((i for i in range(limit, limit - 1000, -1) if document[i].isspace()), limit)
        yield document[start:end], False
        start = end
    yield document[start:], True
