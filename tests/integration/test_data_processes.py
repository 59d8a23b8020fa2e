"""Preparation in several processes: the same result for every number of them, and after any kill."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_settings import TRAIN_TOKENIZER, Data, content, unpack, write_corpus
from transformers import AutoTokenizer

from distlm.data import blocks, corpus, parallel, prepare
from distlm.data.notes import PreparationProgress
from distlm.data.pack import PackedDataset
from distlm.data.prepare import prepare_data
from distlm.errors import InfrastructureError


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 12_000)


@pytest.mark.usefixtures("small_chunks")
def test_the_result_does_not_depend_on_the_number_of_processes(data: Data, cache: Path, tmp_path: Path) -> None:
    data = replace(data, train=[*data.train, write_corpus(tmp_path / "more.jsonl", 150)])
    reports: list[PreparationProgress] = []
    one = prepare_data(replace(data, num_proc=1), TRAIN_TOKENIZER, cache / "1", reports.append)
    three = prepare_data(replace(data, num_proc=3), TRAIN_TOKENIZER, cache / "3")
    assert content(one) == content(three)
    assert replace(one.info, seconds=0) == replace(three.info, seconds=0)
    assert (one.info.train.num_documents, len(one.train_paths)) == (550 - one.info.validation.num_documents, 2)  # type: ignore[union-attr]
    shown = [progress for progress in reports if progress.stage == "tokenizing"]
    assert len(shown) > 8
    assert shown[-1].num_documents == 550 and shown[-1].num_tokens > one.info.train.num_tokens
    assert shown[-1].bytes_done == shown[-1].bytes_total == sum(Path(s.paths[0]).stat().st_size for s in data.train)  # type: ignore[union-attr]
    assert [p.bytes_done for p in shown] == sorted(p.bytes_done for p in shown)
    # Each chunk begins a block of its own, and all documents are there.
    tokenizer = AutoTokenizer.from_pretrained(one.tokenizer_path)
    dataset = PackedDataset(one.train_paths)
    text_ids = dataset[np.arange(len(dataset))][:, 1:]
    decoded = " ".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in text_ids)
    held_out = unpack(one, one.validation_path)
    assert len([word for word in decoded.split() if word.startswith("d")]) >= one.info.train.num_documents
    assert len(held_out) == one.info.validation.num_documents  # type: ignore[union-attr]


def test_data_of_one_chunk_starts_no_process(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("started processes")

    monkeypatch.setattr(parallel, "_start_pool", refuse)
    assert prepare_data(data, TRAIN_TOKENIZER, cache).info.train.num_documents > 300


@pytest.mark.usefixtures("small_chunks")
def test_a_process_that_is_killed_is_reported_and_what_was_done_is_kept(
    data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = blocks.BlockFiles.append

    def append_and_kill(files: blocks.BlockFiles, *arguments: Any) -> None:
        append(files, *arguments)
        if files.num_chunks == 2:
            for process in psutil.Process().children(recursive=True):
                if "forkserver" in " ".join(process.cmdline()) and process.ppid() != os.getpid():
                    process.kill()

    monkeypatch.setattr(blocks, "_COMMIT_INTERVAL_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(blocks.BlockFiles, "append", append_and_kill)
        with pytest.raises(InfrastructureError, match=r"was killed, perhaps for want of memory; lower data\.num_proc"):
            prepare_data(data, TRAIN_TOKENIZER, cache)
    assert next(packed_chunks(data, monkeypatch, cache)) >= 2


class Stop(Exception):
    pass


def packed_chunks(
    data: Data, monkeypatch: pytest.MonkeyPatch, cache: Path, stop_after: int | None = None
) -> Iterator[int]:
    """Numbers of the chunks that are packed; the preparation ends by an error after some of them."""
    numbers: list[int] = []
    real = prepare.pack_in_order

    def note(chunks: Iterator[parallel.Chunk], *arguments: Any) -> Iterator[Any]:
        for chunk, parts in real(chunks, *arguments):
            if len(numbers) == stop_after:
                raise Stop
            numbers.append(chunk.number)
            yield chunk, parts

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "pack_in_order", note)
        patch.setattr(blocks, "_COMMIT_INTERVAL_S", 0.0)
        with contextlib.suppress(Stop):
            prepare_data(data, TRAIN_TOKENIZER, cache)
    yield from numbers


# -------------------------------------------------------------------------------------------- in processes of their own

BEGIN = """
import json, os, resource, signal, sys
from pathlib import Path
from data_settings import *
from distlm.data import blocks, corpus, prepare
from distlm.data.prepare import prepare_data

corpus.CHUNK_CHARACTERS = 12_000

def in_new_process(work, *arguments):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        work(*arguments)
        sys.stdout.flush()
        os._exit(0)
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run_script(code: str, *arguments: object) -> list[str]:
    """The lines that a script prints. It imports once and forks before anything has started threads."""
    command = [sys.executable, "-c", BEGIN + code, *map(str, arguments)]
    ended = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    return ended.stdout.splitlines()


DIE_AGAIN_AND_AGAIN = """
folder = Path(sys.argv[1])
data = Data([Files([path]) for path in sys.argv[2:]])
blocks._COMMIT_INTERVAL_S = 0.0

def die(place, name, after):
    original = getattr(place, name)
    def kill_when_due(*arguments):
        nonlocal after
        if not after:
            os.kill(os.getpid(), signal.SIGKILL)
        after -= 1
        return original(*arguments)
    setattr(place, name, kill_when_due)
    pack = prepare.pack_in_order
    def note(*arguments):
        for chunk, parts in pack(*arguments):
            print("packed", chunk.number, flush=True)
            yield chunk, parts
    prepare.pack_in_order = note
    prepare_data(data, TRAIN_TOKENIZER, folder)

for place, name, after in (
    (blocks.BlockFiles, "append", 2),
    (blocks, "write_json", 2),  # the data is on the disk, the journal is not
    (blocks.BlockFiles, "finish", 0),
    (prepare, "write_json", 0),
    (prepare, "remove_journal", 0),
    (Path, "rename", 0),
):
    print("died", status(in_new_process(die, place, name, after)))
    (partial,) = folder.glob("data-*.partial")
    journal = partial / "journal.json"
    print("journal", json.loads(journal.read_text())["num_chunks"] if journal.exists() else None)
    if name == "write_json" and place is blocks:  # what is beyond the journal is cut off, whatever it is
        with open(partial / "train-00000.arrow", "ab") as file:
            file.write(b"torn")
"""


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(data: Data, cache: Path, tmp_path: Path) -> None:
    """Processes are killed one after the other, each a little further; what the journal holds is not packed again."""
    data = replace(data, train=[*data.train, write_corpus(tmp_path / "more.jsonl", 150)])
    straight = prepare_data(data, TRAIN_TOKENIZER, cache / "straight")
    for trained in (cache / "straight").glob("tokenizer-*"):
        shutil.copytree(trained, cache / "killed" / trained.name)
    told = run_script(DIE_AGAIN_AND_AGAIN, cache / "killed", *(source.paths[0] for source in data.train))
    last = int([line for line in told if line.startswith("packed")][-1].split()[1])
    assert last > 8
    assert told == [
        *("packed 0", "packed 1", "packed 2", "died -9", "journal 2"),
        *("packed 2", "packed 3", "packed 4", "died -9", "journal 4"),
        *(f"packed {number}" for number in range(4, last + 1)),
        *("died -9", f"journal {last + 1}"),
        *("died -9", f"journal {last + 1}") * 2,
        *("died -9", "journal None"),
    ]
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache / "killed")
    assert content(prepared) == content(straight)
    assert replace(prepared.info, seconds=0) == replace(straight.info, seconds=0)
    files = ["info.json", "train-00000.arrow", "train-00001.arrow", "validation.arrow"]
    assert sorted(path.name for path in prepared.train_paths[0].parent.iterdir()) == files
    assert not list((cache / "killed").glob("*.partial"))


def test_processes_end_with_the_one_that_started_them(data: Data, cache: Path) -> None:
    code = """
import psutil
def die(*arguments):
    print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
prepare.BlockFiles.append = die
prepare_data(Data([Files([sys.argv[1]])]), TRAIN_TOKENIZER, Path(sys.argv[2]))
"""
    pids = [int(pid) for line in run_script(code, data.train[0].paths[0], cache) for pid in line.split()]
    assert len(pids) >= 3, "the server and its two processes"
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.1)


def test_two_processes_at_once_end_with_one_result(data: Data, cache: Path) -> None:
    code = """
def work():
    prepared = prepare_data(Data([Files([sys.argv[1]])]), TRAIN_TOKENIZER, Path(sys.argv[2]))
    print(prepared.cached, prepared.info.fingerprint, flush=True)
pids = [in_new_process(work) for _ in range(2)]
assert [status(pid) for pid in pids] == [0, 0]
"""
    first, second = sorted(run_script(code, data.train[0].paths[0], cache))
    assert (first.split()[0], second.split()[0]) == ("False", "True")
    assert first.split()[1] == second.split()[1]
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["data", "tokenizer"]
    assert not list(cache.glob("*.partial"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """20 times the text takes hardly more: measured in processes of their own, and those that they start."""
    code = """
corpus.CHUNK_CHARACTERS = 2**18
def work(path):
    data = Data([Files([path])], validation_fraction=0.0)
    prepare_data(data, TokenizerSettings(train=Train(max_documents=10)), Path(path + ".cache"))
    print(*(resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
for path in sys.argv[1:]:
    status(in_new_process(work, path))
"""
    line = json.dumps({"text": f"alpha beta{' ' * 100_000}gamma"}) + "\n"  # blanks cost little time
    for name, num_documents in (("small", 8), ("large", 160)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", compresslevel=1) as file:
            file.writelines(itertools.repeat(line, num_documents))
    told = run_script(code, tmp_path / "small.jsonl.gz", tmp_path / "large.jsonl.gz")
    (small, small_children), (large, large_children) = ([int(mib) for mib in line.split()] for line in told)
    assert large < small + 12 and large_children < small_children + 12, told  # the text is 16 MB
