"""Training a tokenizer from text: WordPiece as BERT's, byte-level BPE as RoBERTa's, Unigram as ALBERT's and XLM-R's.

The words of the text are counted here, in bounded memory and in a fixed order, and the library's trainer is given the
counts. The same documents give the same WordPiece and BPE, byte for byte. The library's trainer of Unigram adds up
probabilities in the order of a hash table; what that changes is evened out here (`_settled`), unless it decides between
two pieces of practically the same worth at the end of the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distlm.data.encode import slices
from distlm.errors import InputError

TokenizerType = Literal["wordpiece", "bpe", "unigram"]

# Bounds on what is in memory at once.
_MAX_DISTINCT_CHUNKS = 2**18
_MAX_CHARACTERS_OF_CHUNKS = 2**26
_MAX_CHUNK_CHARACTERS = 2**16  # text without blanks is cut there
_MAX_DISTINCT_WORDS = 2**21
_MAX_WORD_CHARACTERS = 100  # as BERT's: beyond it is no word, and trainers take time quadratic in it

PAD, UNK, CLS, SEP, MASK = _BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_METASPACE = "▁"


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    lowercase: bool,
    max_seq_length: int,
    type: TokenizerType = "wordpiece",
) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens are the ids 0 to 4: [PAD] [UNK] [CLS] [SEP] [MASK] for wordpiece, else
    <s> <pad> </s> <unk> <mask>.

    The vocabulary has at most `vocab_size` tokens, fewer where the text yields no more; of a script with too many
    characters, the rarest stay unknown (not to bpe, which knows all bytes and needs 261 tokens for that). Raises
    InputError where the documents hold no text.
    """
    return _TRAIN[type](documents, vocab_size, lowercase, max_seq_length)


def _train_wordpiece(
    documents: Iterable[str], vocab_size: int, lowercase: bool, max_seq_length: int
) -> PreTrainedTokenizerFast:
    """Devlin et al. 2019; CJK ideographs stand alone."""
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    word_counts = _count_words(documents, str.split, normalizer, pre_tokenizer)
    vocabulary = _learn_wordpieces(word_counts, vocab_size)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=_MAX_WORD_CHARACTERS))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
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


def _train_bpe(
    documents: Iterable[str], vocab_size: int, lowercase: bool, max_seq_length: int
) -> PreTrainedTokenizerFast:
    """Liu et al. 2019, after Radford et al. 2019: on bytes, so that every text comes back as it was."""
    # Composed again, so that Hangul is not left in its letters.
    normalizer = _uncased(normalizers.NFD(), normalizers.NFC()) if lowercase else None
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    word_counts = _count_words(documents, _WITH_BLANKS_BEFORE.findall, normalizer, pre_tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_ROBERTA_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _learn(models.BPE(), trainer, word_counts)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return _as_robertas(tokenizer, max_seq_length)


def _train_unigram(
    documents: Iterable[str], vocab_size: int, lowercase: bool, max_seq_length: int
) -> PreTrainedTokenizerFast:
    """Kudo 2018, in the way of SentencePiece."""
    form = _uncased(normalizers.NFKD(), normalizers.NFKC()) if lowercase else normalizers.NFKC()
    normalizer = normalizers.Sequence([form, normalizers.Replace(Regex(r"\s+"), " ")])
    pre_tokenizer = pre_tokenizers.Metaspace(replacement=_METASPACE, prepend_scheme="always")
    word_counts = _count_words(documents, str.split, normalizer, pre_tokenizer)
    # The trainer keeps every character it sees, and where they fill the vocabulary, every piece besides.
    kept = _alphabet(word_counts, vocab_size - len(_ROBERTA_TOKENS) - 1, always=_METASPACE)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=_ROBERTA_TOKENS, unk_token="<unk>", show_progress=False
    )
    learned = json.loads(_learn(models.Unigram(), trainer, _without_others(word_counts, kept)).to_str())["model"]
    first = len(_ROBERTA_TOKENS)
    vocabulary = [tuple(item) for item in learned["vocab"]]
    vocabulary = [*vocabulary[:first], *_settled(vocabulary[first:])]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=_ROBERTA_TOKENS.index("<unk>")))
    tokenizer.add_special_tokens(_ROBERTA_TOKENS)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace(replacement=_METASPACE, prepend_scheme="always")
    return _as_robertas(tokenizer, max_seq_length)


def _settled(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Pieces and scores (log probabilities) without what the order of the library's hash tables has left in them: the
    last digits of sums, and the scores that it gives to characters it had dropped, each 0.0001 above the one before."""
    lowest = min((score for _, score in pieces), default=0.0)
    made_up = lowest + 0.0001 * (sum(len(piece) == 1 for piece, _ in pieces) + 1)
    scores = {piece: lowest if len(piece) == 1 and score <= made_up else score for piece, score in pieces}
    return sorted(((piece, round(score, 4)) for piece, score in scores.items()), key=lambda item: (-item[1], item[0]))


def _uncased(decompose: normalizers.Normalizer, compose: normalizers.Normalizer) -> normalizers.Normalizer:
    return normalizers.Sequence([decompose, normalizers.StripAccents(), normalizers.Lowercase(), compose])


def _as_robertas(tokenizer: Tokenizer, max_seq_length: int) -> PreTrainedTokenizerFast:
    """With RoBERTa's special tokens around a text and between the texts of a pair."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, _ROBERTA_TOKENS.index(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_seq_length,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        # The blank before a word belongs to the word, and so to what is masked.
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


# ---------------------------------------------------------------------------------------------------------------- words

_WITH_BLANKS_BEFORE = re.compile(r"\s*\S+|\s+")


def _count_words(
    documents: Iterable[str],
    split: Callable[[str], list[str]],
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> Counter[str]:
    """How often each pre-token occurs. What `split` makes of a text is counted raw first, so that the normalizer and
    the pre-tokenizer, which look at nothing beyond it, see each distinct piece once."""
    words: Counter[str] = Counter()
    chunks: Counter[str] = Counter()
    num_characters = 0  # that the chunks have at most

    def count_words_of_chunks() -> None:
        for chunk, count in chunks.items():
            text = normalizer.normalize_str(chunk) if normalizer else chunk
            for word, _ in pre_tokenizer.pre_tokenize_str(text):
                for start in range(0, len(word), _MAX_WORD_CHARACTERS):
                    words[word[start : start + _MAX_WORD_CHARACTERS]] += count
        chunks.clear()
        _drop_rare(words)

    for document in documents:
        found = split(document)
        if len(document) > _MAX_CHUNK_CHARACTERS:
            found = [part for chunk in found for part, _ in slices(chunk, _MAX_CHUNK_CHARACTERS)]
        chunks.update(found)
        num_characters += len(document)
        if len(chunks) > _MAX_DISTINCT_CHUNKS or num_characters > _MAX_CHARACTERS_OF_CHUNKS:
            count_words_of_chunks()
            num_characters = 0
    count_words_of_chunks()
    if not words:
        raise InputError("the training sources hold no text to train a tokenizer from")
    return words


def _drop_rare(words: Counter[str]) -> None:
    """Forget the rarest words while there are too many to hold; what they would teach is next to nothing."""
    min_count = 1
    while len(words) > _MAX_DISTINCT_WORDS:
        min_count += 1
        for word in [word for word, count in words.items() if count < min_count]:
            del words[word]


def _alphabet(word_counts: Counter[str], max_characters: int, always: str) -> set[str]:
    """The most frequent characters of the words."""
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        for character in word:
            counts[character] += count
    ranked = sorted(counts.keys() - set(always), key=lambda character: (-counts[character], character))
    return {*always, *ranked[: max_characters - len(always)]}


def _without_others(word_counts: Counter[str], kept: set[str]) -> Counter[str]:
    """The words, cut where they hold other characters."""
    found: Counter[str] = Counter()
    for word, count in word_counts.items():
        if kept.issuperset(word):
            found[word] += count
        else:
            for part in "".join(character if character in kept else " " for character in word).split():
                found[part] += count
    return found


def _learn(model: models.Model, trainer: trainers.Trainer, word_counts: Counter[str]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_text_with(word_counts), trainer)
    return tokenizer


def _text_with(word_counts: Counter[str]) -> Iterator[str]:
    """Text in which each word stands as often as it was counted; the trainers take no counts."""
    max_count = 10_000
    for word, count in sorted(word_counts.items()):
        for start in range(0, count, max_count):
            yield " ".join(repeat(word, min(max_count, count - start)))


# ------------------------------------------------------------------------------------------------------------ WordPiece


def _learn_wordpieces(word_counts: Counter[str], vocab_size: int) -> dict[str, int]:
    """The library's trainer, made deterministic.

    It numbers the tokens of single characters within words ("##a") in the order of a hash table, and breaks ties
    between merges by these numbers (huggingface/tokenizers issue 1794). Here all of them are given to it as special
    tokens, in a fixed order; so is the alphabet, which it would cut to size in the order of a hash table too.
    """
    starts, continuations = _wordpiece_alphabet(word_counts, vocab_size - len(_BERT_TOKENS))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=_BERT_TOKENS + [f"##{character}" for character in continuations],
        initial_alphabet=starts,
        limit_alphabet=len(starts),
        show_progress=False,
    )
    vocabulary: dict[str, int] = _learn(models.WordPiece(unk_token=UNK), trainer, word_counts).get_vocab()
    return vocabulary


def _wordpiece_alphabet(word_counts: Counter[str], max_tokens: int) -> tuple[list[str], list[str]]:
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


_TRAIN: dict[str, Callable[[Iterable[str], int, bool, int], PreTrainedTokenizerFast]] = {
    "wordpiece": _train_wordpiece,
    "bpe": _train_bpe,
    "unigram": _train_unigram,
}
