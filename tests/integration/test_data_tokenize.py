"""Training, loading and using tokenizers."""

from __future__ import annotations

import inspect
import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distlm.data import encode
from distlm.data import train_tokenizer as training
from distlm.data.encode import Encoder
from distlm.data.tokenize import load_tokenizer, tokenizer_digest
from distlm.data.train_tokenizer import TokenizerType, train_tokenizer
from distlm.errors import InputError


def english(num_documents: int, seed: int = 0) -> list[str]:
    """Documents of made-up words, many of which occur equally often, so that there are ties between merges."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(2000)]
    return [" ".join(generator.choices(words, k=80)).capitalize() + ", café №1." for _ in range(num_documents)]


def token_ids(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[tuple[list[int], bool]]:
    return list(Encoder(tokenizer.backend_tokenizer.to_str()).ids(documents))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(english(200), vocab_size=600, lowercase=True, max_seq_length=64)


def test_training_twice_gives_the_same_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path / "0")
    for attempt in range(1, 4):
        again = train_tokenizer(iter(english(200)), vocab_size=600, lowercase=True, max_seq_length=64)
        again.save_pretrained(tmp_path / str(attempt))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / str(attempt) / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_trained_tokenizer_is_berts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (loaded.pad_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id) == (0, 2, 3, 4)
    assert len(loaded) == 600
    assert loaded.model_max_length == 64
    assert loaded("Café", "ba").tokens()[0] == "[CLS]"
    assert loaded.decode(loaded("CAFÉ, bana", "ba").input_ids) == "[CLS] cafe, bana [SEP] ba [SEP]"
    assert loaded("a [MASK] b").input_ids[2] == 4
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizer)


def test_unigram_finds_no_special_token_in_the_text() -> None:
    texts = english(100) + ["a <s>struck</s> word and <mask> here"] * 20
    unigram = train_tokenizer(texts, vocab_size=300, lowercase=True, max_seq_length=64, type="unigram")
    ((ids, _),) = token_ids(unigram, ["fox <mask> dog <s>word</s> [MASK] <pad>"])
    assert not {unigram.mask_token_id, unigram.pad_token_id, unigram.cls_token_id, unigram.sep_token_id} & set(ids)
    plain = english(5, seed=1)
    assert [ids for ids, _ in token_ids(unigram, plain)] == unigram(plain, add_special_tokens=False).input_ids
    unigram.add_tokens(["fox"])
    ((ids, _),) = token_ids(unigram, ["a fox"])
    assert unigram.convert_tokens_to_ids("fox") in ids


def test_cased_tokenizer_keeps_case_and_accents() -> None:
    cased = train_tokenizer(english(50), vocab_size=600, lowercase=False, max_seq_length=64)
    assert cased.decode(cased("café", add_special_tokens=False).input_ids) == "café"
    assert "C" in cased.get_vocab() or "B" in cased.get_vocab()


def test_counting_in_portions_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("_MAX_DISTINCT_CHUNKS", "_MAX_CHARACTERS_OF_CHUNKS"):
        with monkeypatch.context() as patch:
            patch.setattr(training, bound, 50)
            again = train_tokenizer(english(200), vocab_size=600, lowercase=True, max_seq_length=64)
        assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


def test_text_without_blanks_is_counted_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MAX_CHARACTERS_OF_CHUNKS", 5000)
    monkeypatch.setattr(training, "_MAX_CHUNK_CHARACTERS", 1000)
    held: list[int] = []

    class Chunks(Counter[str]):
        def clear(self) -> None:
            if self:
                held.extend([sum(map(len, self)), max(map(len, self))])
            super().clear()

    generator = random.Random(0)
    documents = ["".join(generator.choices("天地玄黄宇宙洪荒", k=3500)) for _ in range(20)]
    monkeypatch.setattr(training, "Counter", Chunks)
    words = training._count_words(iter(documents), str.split, None, training.pre_tokenizers.BertPreTokenizer())
    assert sum(map(len, words.elements())) == 20 * 3500
    assert len(held) == 20 and max(held[::2]) <= 5000 + 3500 and max(held[1::2]) <= 1000


def test_vocabulary_keeps_to_its_size_where_characters_are_many() -> None:
    common, rare = "秦川雄帝宅", "".join(chr(0x5000 + i) for i in range(500))
    trained = train_tokenizer([common * 20, rare, "word"], vocab_size=100, lowercase=True, max_seq_length=64)
    assert len(trained) <= 100
    assert trained.unk_token_id not in trained(common).input_ids
    assert trained.unk_token_id in trained(rare).input_ids


def test_training_without_text_is_refused() -> None:
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(["", " \n"], vocab_size=100, lowercase=True, max_seq_length=64)


def test_ids_are_those_of_the_tokenizer_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [*english(40, seed=1), "", " ", "x"]
    pieces = token_ids(tokenizer, documents)
    assert all(ends_document for _, ends_document in pieces)
    assert [ids for ids, _ in pieces] == tokenizer(documents, add_special_tokens=False).input_ids


def test_long_documents_are_tokenized_in_slices_without_a_trace(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_SLICE_CHARACTERS", 1500)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 4000)
    documents = [" ".join(english(100)), "short", "a" * 5000 + " " + "b" * 10]
    pieces = token_ids(tokenizer, documents)
    assert [ends_document for _, ends_document in pieces].count(True) == 3
    assert len(pieces) > 30
    joined: list[list[int]] = [[]]
    for ids, ends_document in pieces:
        joined[-1].extend(ids)
        if ends_document:
            joined.append([])
    whole = tokenizer(documents, add_special_tokens=False).input_ids
    assert joined[:2] == whole[:2]
    assert joined[2][-1] == whole[2][-1]  # a word without blanks is cut where it must be


def test_special_tokens_in_the_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    [(ids, _)] = token_ids(tokenizer, ["be [MASK] [SEP] [PAD] [CLS] ba"])
    assert not {0, 2, 3, 4} & set(ids)
    assert 4 in tokenizer("be [MASK] ba").input_ids  # the tokenizer itself still knows them


def test_a_tokenizers_own_truncation_and_padding_are_off(tokenizer: PreTrainedTokenizerFast) -> None:
    truncating = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    truncating.backend_tokenizer.enable_truncation(16)
    truncating.backend_tokenizer.enable_padding(length=16)
    documents = ["ba be", english(1)[0]]
    assert token_ids(truncating, documents) == token_ids(tokenizer, documents)


def test_digest_changes_with_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    other = train_tokenizer(english(200), vocab_size=599, lowercase=True, max_seq_length=64)
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    (tmp_path / "torn" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "torn"))

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="no mask_token and no pad_token"):
        load_tokenizer(str(tmp_path / "plain"))


# -------------------------------------------------------------------------------------------------------- all the types

REAL_DATA = Path(os.environ.get("DISTLM_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
TYPES: tuple[TokenizerType, ...] = ("wordpiece", "bpe", "unigram")
MIXED = (
    "Hello 世界，秦川雄帝宅。🎉👩‍👩‍👧 مرحبا नमस्ते"
    " ﬁ e\u0301 ＡＢＣ 한국어 Ünïcode\n\n    indented\tx = [MASK] <mask>\u3000\u200b"
)


def poems(number: int) -> list[str]:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}; set DISTLM_TEST_DATA")
    with open(REAL_DATA / "tang_poems" / "train.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in islice(file, number)]


def unknown_share(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    ids = [id for ids, _ in token_ids(tokenizer, documents) for id in ids]
    return ids.count(tokenizer.unk_token_id) / len(ids)


def test_byte_level_bpe_gives_every_text_back(tmp_path: Path) -> None:
    trained = train_tokenizer(english(30), 400, lowercase=False, max_seq_length=64, type="bpe")
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in (MIXED, "".join(map(chr, range(0x20, 0x2000))), "".join(poems(20))):
        [(ids, _)] = token_ids(loaded, [text])
        assert loaded.unk_token_id not in ids and not {0, 1, 2, 4} & set(ids)
        assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text
    assert "Ġ" in "".join(loaded.get_vocab()) and len(loaded) == 400


@pytest.mark.parametrize("type", TYPES[1:])
def test_robertas_special_tokens_stand_where_roberta_has_them(tmp_path: Path, type: TokenizerType) -> None:
    train_tokenizer(english(60), 400, lowercase=True, max_seq_length=64, type=type).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    named = ("bos", "pad", "eos", "unk", "mask", "cls", "sep")
    assert [getattr(loaded, f"{name}_token_id") for name in named] == [0, 1, 2, 3, 4, 0, 2]
    assert loaded.decode(loaded("CAFÉ bana", "ba").input_ids).replace(" ", "") == "<s>cafebana</s></s>ba</s>"
    assert loaded("ba <mask> ba").input_ids.count(4) == 1
    assert loaded.model_max_length == 64


@pytest.mark.parametrize("type", TYPES)
def test_chinese_fills_the_vocabulary_and_never_more(type: TokenizerType) -> None:
    documents = poems(600)
    num_characters = len(set("".join(documents)))
    for vocab_size in (300, num_characters + 100):
        trained = train_tokenizer(documents, vocab_size, lowercase=True, max_seq_length=64, type=type)
        assert 0.9 * vocab_size <= len(trained) <= vocab_size
        # A small vocabulary holds the most frequent characters: about half of the text.
        limit = 0.0 if type == "bpe" else 0.6 if vocab_size == 300 else 0.001
        assert unknown_share(trained, documents) <= limit
    if type == "wordpiece":
        assert trained.tokenize("秦川word雄") == ["秦", "川", *trained.tokenize("word"), "雄"]
        assert not [token for token in trained.get_vocab() if len(token.removeprefix("##")) > 1 and "秦" in token]


def test_wordpiece_and_unigram_know_all_the_scripts_they_were_trained_on() -> None:
    for type in ("wordpiece", "unigram"):
        trained = train_tokenizer([MIXED] * 3, 300, lowercase=False, max_seq_length=64, type=type)
        assert unknown_share(trained, [MIXED]) == 0, type


def test_another_process_trains_the_same_tokenizers() -> None:
    """In another process hash tables have another order."""

    def digests() -> list[str]:
        documents = [*english(100), *poems(100), MIXED]
        return [tokenizer_digest(train_tokenizer(documents, 700, False, 64, type)) for type in TYPES]

    code = f"from test_data_tokenize import *\n{textwrap.dedent(inspect.getsource(digests))}\nprint(digests())"
    other = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert other.stdout.strip() == str(digests()), other.stderr


def test_rare_words_are_forgotten_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_MAX_DISTINCT_CHUNKS", 100)
    monkeypatch.setattr(training, "_MAX_DISTINCT_WORDS", 1000)
    counted = []
    drop_rare = training._drop_rare

    def drop_and_count(words: Counter[str]) -> None:
        drop_rare(words)
        counted.append(len(words))

    monkeypatch.setattr(training, "_drop_rare", drop_and_count)
    rare = [" ".join(f"x{document}y{word}" for word in range(50)) + " often" for document in range(100)]
    trained = train_tokenizer(rare, 300, lowercase=True, max_seq_length=64)
    assert len(counted) > 10 and max(counted) <= 1000
    assert trained.tokenize("often") == ["often"]


def test_a_word_without_end_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for type in TYPES:
        trained = train_tokenizer(["ab" * 500_000, "ab ab"], 270, lowercase=True, max_seq_length=64, type=type)
        assert len(trained) <= 270
