"""Training, loading and using tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distlm.data import tokenize
from distlm.data.tokenize import load_tokenizer, token_ids, tokenizer_digest, train_tokenizer
from distlm.errors import InputError


def english(num_documents: int, seed: int = 0) -> list[str]:
    """Documents of made-up words, many of which occur equally often, so that there are ties between merges."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(2000)]
    return [" ".join(generator.choices(words, k=80)).capitalize() + ", café №1." for _ in range(num_documents)]


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


def test_cased_tokenizer_keeps_case_and_accents() -> None:
    cased = train_tokenizer(english(50), vocab_size=600, lowercase=False, max_seq_length=64)
    assert cased.decode(cased("café", add_special_tokens=False).input_ids) == "café"
    assert "C" in cased.get_vocab() or "B" in cased.get_vocab()


def test_counting_in_portions_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_MAX_DISTINCT_CHUNKS", 50)
    again = train_tokenizer(english(200), vocab_size=600, lowercase=True, max_seq_length=64)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


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
    pieces = list(token_ids(tokenizer, documents))
    assert all(ends_document for _, ends_document in pieces)
    assert [ids for ids, _ in pieces] == tokenizer(documents, add_special_tokens=False).input_ids


def test_long_documents_are_tokenized_in_slices_without_a_trace(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_SLICE_CHARACTERS", 1500)
    monkeypatch.setattr(tokenize, "_BATCH_CHARACTERS", 4000)
    documents = [" ".join(english(100)), "short", "a" * 5000 + " " + "b" * 10]
    pieces = list(token_ids(tokenizer, documents))
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
    assert list(token_ids(truncating, documents)) == list(token_ids(tokenizer, documents))


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
