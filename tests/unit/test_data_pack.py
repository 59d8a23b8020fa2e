"""Packing documents into blocks loses nothing, and the file gives the blocks back."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from distlm.data import pack
from distlm.data.pack import END_OF_STREAM, BlockLayout, BlockWriter, PackedDataset

CLS, SEP, PAD = 1, 2, 0
FIRST_WORD = 10

LAYOUTS = [
    BlockLayout(length=8, first=CLS, separator=SEP, pad=PAD, vocab_size=100),
    BlockLayout(length=8, first=None, separator=SEP, pad=PAD, vocab_size=100),
    BlockLayout(length=5, first=CLS, separator=None, pad=PAD, vocab_size=100),
    BlockLayout(length=3, first=None, separator=None, pad=PAD, vocab_size=70_000),
    BlockLayout(length=3, first=CLS, separator=SEP, pad=PAD, vocab_size=2**16),
]


def write_blocks(path: Path, layout: BlockLayout, documents: list[list[int]]) -> BlockWriter:
    with open(path, "wb") as file:
        file.write(layout.schema.serialize())
        writer = BlockWriter(file, layout)
        for ids in documents:
            writer.add(ids)
        writer.close()
        file.write(END_OF_STREAM)
    return writer


def read_blocks(path: Path) -> np.ndarray:
    dataset = PackedDataset([path])
    return dataset[np.arange(len(dataset))]


def unpack(blocks: np.ndarray, layout: BlockLayout) -> list[int]:
    """The bodies one after the other: what the documents and the separators between them are."""
    tokens = [token for block in blocks.tolist() for token in block[layout.body]]
    while tokens and tokens[-1] == layout.pad:
        tokens.pop()
    if blocks.size and layout.separator is not None and blocks[-1, -1] == layout.pad:
        assert tokens.pop() == layout.separator  # the end of a last block that is not full
    return tokens


def join(documents: list[list[int]], separator: int | None) -> list[int]:
    joined: list[int] = []
    for ids in filter(None, documents):
        joined += ([separator] if joined and separator is not None else []) + ids
    return joined


def test_blocks_of_bert(tmp_path: Path) -> None:
    layout = LAYOUTS[0]
    writer = write_blocks(tmp_path / "a", layout, [[11, 12, 13], [], [14, 15, 16, 17, 18], [19]])
    assert read_blocks(tmp_path / "a").tolist() == [
        [CLS, 11, 12, 13, SEP, 14, 15, SEP],
        [CLS, 16, 17, 18, SEP, 19, SEP, PAD],
    ]
    assert (writer.num_blocks, writer.num_tokens) == (2, 15)


def test_blocks_without_special_tokens(tmp_path: Path) -> None:
    write_blocks(tmp_path / "a", LAYOUTS[3], [[11, 12], [13, 69_999]])
    assert read_blocks(tmp_path / "a").tolist() == [[11, 12, 13], [69_999, PAD, PAD]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("blocks_per_batch", [1, 2, 1000])
def test_packing_loses_no_token(
    tmp_path: Path, layout: BlockLayout, blocks_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of tokens up to several blocks, cut into documents (some empty, some in parts) in random ways."""
    monkeypatch.setattr(pack, "_BATCH_BYTES", blocks_per_batch * layout.length * layout.dtype.itemsize)
    generator = random.Random(0)
    for num_tokens in range(4 * layout.length + 1):
        for trial in range(4):
            tokens = [generator.randrange(FIRST_WORD, layout.vocab_size) for _ in range(num_tokens)]
            cuts = sorted(generator.choices(range(num_tokens + 1), k=trial * 2))
            documents = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, num_tokens], strict=True)]
            path = tmp_path / f"{num_tokens}-{trial}"
            with open(path, "wb") as file:
                file.write(layout.schema.serialize())
                writer = BlockWriter(file, layout)
                for ids in documents:
                    cut = generator.randint(0, len(ids))
                    writer.add(ids[:cut], ends_document=False)
                    writer.add(ids[cut:], ends_document=True)
                writer.close()
                file.write(END_OF_STREAM)
            blocks = read_blocks(path)
            expected = join(documents, layout.separator)
            assert unpack(blocks, layout) == expected
            assert len(blocks) == writer.num_blocks == -(-len(expected) // layout.body_length)
            num_real = len(expected) + writer.num_blocks * (layout.length - layout.body_length)
            assert writer.num_tokens == num_real == (blocks != layout.pad).sum()
            if layout.first is not None:
                assert (blocks[:, 0] == layout.first).all()
            if layout.separator is not None:
                assert (blocks[:-1, -1] == layout.separator).all()


def test_batches_but_the_last_are_equal_and_hold_the_smallest_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_BATCH_BYTES", 100)
    for vocab_size, kind in [(2**16, pa.uint16()), (2**16 + 1, pa.int32())]:
        layout = BlockLayout(length=8, first=CLS, separator=SEP, pad=PAD, vocab_size=vocab_size)
        write_blocks(tmp_path / "a", layout, [[vocab_size - 1] * 200])
        with pa.memory_map(str(tmp_path / "a")) as file, pa.ipc.open_stream(file) as stream:
            assert stream.schema.field("input_ids").type == pa.list_(kind, 8)
            sizes = [batch.num_rows for batch in stream]
        assert len(sizes) > 2
        assert set(sizes[:-1]) == {layout.blocks_per_batch}
        assert read_blocks(tmp_path / "a").max() == vocab_size - 1


def test_dataset_gives_any_blocks_in_the_order_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_BATCH_BYTES", 7 * 16)
    write_blocks(tmp_path / "a", LAYOUTS[0], [list(range(FIRST_WORD, 100)) * 5])
    dataset = PackedDataset([tmp_path / "a"])
    everything = dataset[np.arange(len(dataset))]
    indices = np.array([40, 3, 3, len(dataset) - 1, 0])
    assert dataset[indices].tolist() == everything[indices].tolist()
    assert dataset[indices].dtype == np.int64
    assert dataset[indices].flags.writeable
    assert dataset[np.array([], np.int64)].shape == (0, 8)
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError, match=rf"\[0, {len(dataset)}\)"):
            dataset[np.array([outside])]


def test_dataset_reads_from_the_file_and_not_from_a_copy(tmp_path: Path) -> None:
    write_blocks(tmp_path / "a", LAYOUTS[0], [[11] * 600])
    before = pa.total_allocated_bytes()
    dataset = PackedDataset([tmp_path / "a"])
    assert pa.total_allocated_bytes() - before < 100
    assert not dataset._batches[0].flags.owndata
    assert not dataset._batches[0].flags.writeable


def test_no_text_gives_no_block(tmp_path: Path) -> None:
    writer = write_blocks(tmp_path / "a", LAYOUTS[0], [[], []])
    assert (writer.num_blocks, writer.num_tokens, len(PackedDataset([tmp_path / "a"]))) == (0, 0, 0)


def special_ids(**ids: int) -> SimpleNamespace:
    names = ("cls", "sep", "bos", "eos", "pad", "unk")
    return SimpleNamespace(**{f"{name}_token_id": ids.get(name) for name in names})


@pytest.mark.parametrize(
    ("ids", "first", "separator"),
    [
        ({"cls": 5, "sep": 6, "bos": 7, "eos": 8}, 5, 6),
        ({"bos": 0, "eos": 8}, 0, 8),
        ({"eos": 8}, None, 8),
        ({}, None, None),
    ],
)
def test_other_tokenizers_special_tokens_stand_in(
    ids: dict[str, int], first: int | None, separator: int | None
) -> None:
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return 100

    layout = BlockLayout.of(Tokenizer(**vars(special_ids(pad=9, **ids))), 16)
    assert (layout.first, layout.separator, layout.pad, layout.vocab_size) == (first, separator, 9, 100)
    assert layout.body_length == 16 - (first is not None) - (separator is not None)


def test_several_files_are_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size, also where parts of different sizes were joined."""
    monkeypatch.setattr(pack, "_BATCH_BYTES", 3 * 16)
    layout = LAYOUTS[0]
    for name, first in (("a", 20), ("b", 40), ("c", 60)):
        with open(tmp_path / name, "wb") as file:
            file.write(layout.schema.serialize())
            for part in range(3):
                writer = BlockWriter(file, layout)
                writer.add([first + part] * (7 * part + 1 if name != "b" else 0))
                writer.close()
            file.write(END_OF_STREAM)
    paths = [tmp_path / name for name in "abc"]
    dataset = PackedDataset(paths)
    assert dataset.sizes == [1 + 2 + 3, 0, 1 + 2 + 3]
    everything = dataset[np.arange(12)]
    assert everything[:, 1].tolist() == [20, 21, 21, 22, 22, 22, 60, 61, 61, 62, 62, 62]
    indices = np.array([11, 0, 6, 5, 5, 2])
    assert dataset[indices].tolist() == everything[indices].tolist()
    for path in paths:
        with pa.ipc.open_stream(path.read_bytes()) as stream:
            assert stream.read_all().num_rows in (0, 6)


def test_unknown_tokens_are_counted_and_padding_is_not(tmp_path: Path) -> None:
    layout = BlockLayout(length=8, first=CLS, separator=SEP, pad=PAD, vocab_size=100, unknown=5)
    assert write_blocks(tmp_path / "a", layout, [[5, 11, 5], [12] * 9, [5]]).num_unknown_tokens == 3
