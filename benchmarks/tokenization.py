"""Tokenise and pack, as a run does before it trains, against the library's `encode_batch` alone on the same cores.

    python benchmarks/tokenization.py [FILE...] [--repeat 3] [--max-mb 30] [--text-column text] [--vocab-size 30000]

Without files the text is the documentation of the installed packages. Trains a WordPiece tokenizer on its beginning.
Then, interleaved: `tokenizers` encodes all documents, which are in memory already, in batches, on all cores; and distlm
reads the files, tokenises, packs and writes the blocks, with a process per core, whose start counts, too. Prints the
median of each in seconds and text MB/s, and the ratio of the speeds. Goal: at least 0.8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from distlm.config.schema import DataConfig, FilesSource, PythonDocsSource, TokenizerConfig, TrainedTokenizer
from distlm.data.prepare import prepare_data
from distlm.data.sources import SourceReader, files_of

_BATCH_DOCUMENTS = 1000


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files, folders or globs, as in data.train.0.paths")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-mb", type=float, default=30.0)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--vocab-size", type=int, default=30_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.files:
            options.files = [str(write_docs(Path(folder) / "docs.jsonl", options.text_column))]
        measure(options, Path(folder))


def write_docs(path: Path, text_column: str) -> Path:
    source = PythonDocsSource(source="python-docs")
    with open(path, "w", encoding="utf-8") as file:
        for piece in SourceReader(source, files_of(source)):
            file.write(json.dumps({text_column: piece.text}) + "\n")
    return path


def measure(options: argparse.Namespace, folder: Path) -> None:
    source = FilesSource(source="files", paths=options.files, text_column=options.text_column)
    documents: list[str] = []
    num_bytes = 0
    for piece in SourceReader(source, files_of(source)):
        documents.append(piece.text)
        num_bytes += len(piece.text.encode())
        if num_bytes >= options.max_mb * 1e6:
            break
    source = source.model_copy(update={"max_documents": len(documents)})
    data = DataConfig(train=[source], validation_fraction=0.0, max_seq_length=128)
    trained = TokenizerConfig(train=TrainedTokenizer(vocab_size=options.vocab_size, max_documents=2000))

    prepared = prepare_data(data, trained, folder / "first")
    tokenizer_path = prepared.tokenizer_path
    existing = TokenizerConfig(name_or_path=str(tokenizer_path))

    def encode_alone() -> None:
        tokenizer = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))  # without the words it has seen
        for start in range(0, len(documents), _BATCH_DOCUMENTS):
            tokenizer.encode_batch(documents[start : start + _BATCH_DOCUMENTS], add_special_tokens=False)

    def tokenise_and_pack() -> None:
        prepare_data(data, existing, Path(tempfile.mkdtemp(dir=folder)))

    times: dict[str, list[float]] = {"tokenizers.encode_batch": [], "distlm, tokenise and pack": []}
    for _ in range(options.repeat):  # interleaved, so that a busy moment of the machine hits both
        times["tokenizers.encode_batch"].append(seconds(encode_alone))
        times["distlm, tokenise and pack"].append(seconds(tokenise_and_pack))

    cores = len(os.sched_getaffinity(0))
    print(f"{num_bytes / 1e6:.1f} MB of text, {len(documents):,} documents, {prepared.info.train.num_tokens:,} tokens")
    print(f"{cores} cores")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:27s} {median:7.2f} s   {num_bytes / 1e6 / median:6.2f} MB/s")
    alone, whole = (statistics.median(measured) for measured in times.values())
    print(f"ratio of the speeds: {alone / whole:.2f} (goal: at least 0.8)")


if __name__ == "__main__":
    main()
