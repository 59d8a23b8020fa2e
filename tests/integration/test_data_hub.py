"""Data sets that the library `datasets` loads: copied into the cache, up to a limit, going on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_settings import TRAIN_TOKENIZER, Data, HubDataset, content, text, unpack

from distlm.data import hub
from distlm.data.cache import fingerprint
from distlm.data.notes import notes
from distlm.data.prepare import prepare_data
from distlm.data.sources import SourceReader, files_of
from distlm.errors import InfrastructureError, InputError


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A local data set of two Parquet files."""
    (tmp_path / "data_set").mkdir()
    for number in range(2):
        texts = [text(number * 200 + i) if i != 7 else None for i in range(200)]
        table = pa.table({"id": range(200), "text": pa.array(texts, pa.string())})
        pq.write_table(table, tmp_path / f"data_set/train-{number}.parquet", row_group_size=50)
    return tmp_path / "data_set"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_is_copied_once_and_read_like_files(data_set: Path, cache: Path, streaming: bool) -> None:
    source = HubDataset(str(data_set), streaming=streaming)
    prepared = prepare_data(Data([source], validation_fraction=0.0), TRAIN_TOKENIZER, cache)
    assert unpack(prepared, prepared.train_paths[0]) == [text(number) for number in range(400) if number % 200 != 7]
    (told,) = prepared.info.sources["train"]
    assert (told["num_documents"], told["num_empty_documents"], told["reached_limit"]) == (400, 2, "")
    (copy,) = cache.glob("dataset-*")
    shutil.rmtree(prepared.train_paths[0].parent)
    before = (copy / "part-00000.parquet").stat().st_mtime_ns
    assert content(prepare_data(Data([source], validation_fraction=0.0), TRAIN_TOKENIZER, cache))
    assert (copy / "part-00000.parquet").stat().st_mtime_ns == before


def test_builders_limits_and_their_report(data: Data, cache: Path) -> None:
    path = data.train[0].paths[0]  # type: ignore[union-attr]
    limited = HubDataset("json", [path], max_documents=100)
    tiny = HubDataset("json", [path], max_gib=5000 / 2**30)
    whole = HubDataset("json", [path], max_documents=400)
    prepared = prepare_data(Data([limited, tiny, whole]), TRAIN_TOKENIZER, cache)
    first, second, third = prepared.info.sources["train"]
    assert (first["num_documents"], first["reached_limit"]) == (100, "max_documents = 100")
    assert (third["num_documents"], third["reached_limit"]) == (400, "")
    assert 4500 < second["num_text_bytes"] <= 5000
    assert [note for note in notes(prepared.info.sources) if "read up to max_documents = 100; there is more" in note]


def test_copying_goes_on_where_it_was_killed(data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_PART_BYTES", 3000)
    source = HubDataset(str(data_set))
    read: list[int] = []
    copied_rows = hub._Copy._rows

    def break_off(copy: hub._Copy, rows: Any) -> Iterator[dict[str, Any]]:
        for number, value in enumerate(copied_rows(copy, rows)):
            if number == 150:
                raise KeyboardInterrupt
            read.append(number)
            yield value

    with monkeypatch.context() as patch:
        patch.setattr(hub._Copy, "_rows", break_off)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                prepare_data(Data([source]), TRAIN_TOKENIZER, cache)
    (partial,) = cache.glob("dataset-*.partial")
    state = json.loads((partial / "state.json").read_text())
    assert 240 < state["num_documents"] <= 300 and len(list(partial.glob("part-*"))) == state["num_parts"] > 5
    (partial / f"part-{state['num_parts']:05d}.parquet").write_bytes(b"torn")
    prepared = prepare_data(Data([source], validation_fraction=0.0), TRAIN_TOKENIZER, cache)
    assert unpack(prepared, prepared.train_paths[0]) == [text(number) for number in range(400) if number % 200 != 7]


def copied(source: HubDataset, cache: Path) -> list[str]:
    cache.mkdir(parents=True, exist_ok=True)
    copy = hub.copy_dataset("data.train.0", source, cache, lambda progress: None, None)
    return [piece.text for piece in SourceReader(copy.files, files_of(copy.files))]


@pytest.mark.parametrize("name", ["dataset.json", "state.json", "rename"])
def test_copying_that_ends_before_the_folder_is_whole_copies_nothing_twice(
    data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hub, "_PART_BYTES", 20_000)
    write, rename, unlink = hub.write_json, Path.rename, Path.unlink

    def die(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if name == "dataset.json":
            patch.setattr(hub, "write_json", lambda path, value: (die if path.name == name else write)(path, value))
        elif name == "state.json":
            patch.setattr(Path, "unlink", lambda path, **more: (die if path.name == name else unlink)(path, **more))
        else:
            patch.setattr(Path, "rename", lambda path, to: (die if path.name.startswith("data") else rename)(path, to))
        with pytest.raises(KeyboardInterrupt):
            copied(HubDataset(str(data_set)), cache)
    assert copied(HubDataset(str(data_set)), cache) == [
        text(number) if number % 200 != 7 else "" for number in range(400)
    ]
    (folder,) = cache.glob("dataset-*")
    assert sorted({path.suffix for path in folder.iterdir()}) == [".json", ".parquet"]
    assert not (folder / "state.json").exists()


@pytest.mark.parametrize(
    "error", [ConnectionError("503 from the Hub"), OSError(28, "No space left on device"), TimeoutError()]
)
@pytest.mark.parametrize("where", ["load", "read"])
def test_a_failure_of_the_network_or_the_disk_keeps_what_is_copied(
    data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, where: str
) -> None:
    monkeypatch.setattr(hub, "_PART_BYTES", 3000)
    copied_rows = hub._Copy._rows

    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    def break_off(copy: hub._Copy, rows: Any) -> Iterator[dict[str, Any]]:
        for number, value in enumerate(copied_rows(copy, rows)):
            if number == 150:
                copy._explained(fail)
            yield value

    with monkeypatch.context() as patch:
        if where == "load":
            patch.setattr(datasets, "load_dataset", fail)
        else:
            patch.setattr(hub._Copy, "_rows", break_off)
        with pytest.raises(InfrastructureError):
            copied(HubDataset(str(data_set)), cache)
    (partial,) = cache.glob("dataset-*.partial")
    assert (partial / "state.json").exists() == (where == "read")


def test_what_cannot_be_looked_up_ends_no_copy_that_has_begun(
    data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any, **more: Any) -> Any:
        raise ConnectionError("Couldn't reach 'some/corpus' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(hub, "_commit", lambda source: None)
    source = HubDataset("some/corpus")
    with pytest.raises(InputError):
        copied(source, cache)
    partial = cache / f"dataset-{fingerprint(hub._FORMAT_VERSION, hub._what_is_read(source))}-local.partial"
    partial.mkdir()
    state = {"num_parts": 1, "num_documents": 1, "num_bytes": 1, "position": {}}
    (partial / "state.json").write_text(json.dumps(state))
    with pytest.raises(InfrastructureError, match="copying goes on when the run is resumed"):
        copied(source, cache)
    assert (partial / "state.json").exists()


def test_the_reason_for_a_refusal_holds_no_secret_of_a_url(
    data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise FileNotFoundError("https://me:secret@example.org/a.jsonl?sig=secret is gone")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"https://\*\*\*@example.org/a.jsonl is gone$"):
        copied(HubDataset("json", ["https://me:secret@example.org/a.jsonl?sig=secret"]), cache)


def test_what_is_stored_of_urls_holds_no_secret(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, path = datasets.load_dataset, data.train[0].paths[0]
    url = "https://me:secret@example.org/a.jsonl?sig=secret"

    def from_url(name: str, *arguments: Any, data_files: list[str], **more: Any) -> Any:
        assert data_files == [url]
        return load(name, data_files=[path], **more)

    monkeypatch.setattr(datasets, "load_dataset", from_url)
    prepared = prepare_data(Data([HubDataset("json", [url])]), TRAIN_TOKENIZER, cache)
    assert prepared.info.sources["train"][0]["data_files"] == ["https://***@example.org/a.jsonl"]
    assert not [file for file in cache.rglob("*.json") if "secret" in file.read_text()]


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"split": "trian"}, "split", "Bad split: trian. Available splits: ['train']"),
        ({"name": "de"}, "name", "BuilderConfig 'de' not found"),
        ({"text_column": "txt"}, "text_column", "no column 'txt'; the columns are 'id', 'text'; did you mean 'text'?"),
        ({"text_column": "id"}, "text_column", "column 'id' holds a int, not text"),
        ({"path": "/nowhere"}, "path", "no such folder"),
        ({"path": "~/ds"}, "path", "'~' is not expanded here; write ${HOME} for it"),
        ({"path": "json"}, "path", "needs data_files"),
        ({"path": "json", "data_files": ["gone.jsonl"]}, "data_files", "no file matches"),
        ({"max_gib": 5 / 2**30}, "max_gib", "the first document alone is larger; raise it"),
        ({"path": "nobody/nothing"}, "path", "nobody/nothing"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_refused_with_its_key(
    data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], key: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    source = replace(HubDataset(str(data_set)), **change)
    with pytest.raises(InputError) as caught:
        prepare_data(Data([source]), TRAIN_TOKENIZER, cache)
    (found,) = caught.value.problems
    assert found.key == f"data.train.0.{key}" and message in found.message and "\n" not in found.message
    assert not list(cache.glob("dataset-*"))


def test_no_code_of_a_data_set_is_executed(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(InputError, match="Dataset scripts are no longer supported"):
        prepare_data(Data([HubDataset(str(folder))]), TRAIN_TOKENIZER, cache)
    assert not (tmp_path / "executed").exists()


def test_a_run_keeps_the_commit_it_began_with(data_set: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is played by the local folder: each commit has one file."""
    load, commit = datasets.load_dataset, "a" * 40

    def from_hub(path: str, name: str | None, revision: str | None = None, **arguments: Any) -> Any:
        assert revision is not None
        return load("parquet", **(arguments | {"data_files": [f"{data_set}/train-{int(revision[0] == 'b')}.parquet"]}))

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    monkeypatch.setattr(hub, "_commit", lambda source: commit)
    wanted = Data([HubDataset("some/corpus")], validation_fraction=0.0)
    first = prepare_data(wanted, TRAIN_TOKENIZER, cache)
    assert first.info.sources["train"][0]["commit"] == commit
    commit = "b" * 40  # somebody has pushed
    assert not prepare_data(wanted, TRAIN_TOKENIZER, cache).cached
    again = prepare_data(wanted, TRAIN_TOKENIZER, cache, commits={"data.train.0": "a" * 40})
    assert again.cached and again.info == first.info
    monkeypatch.setattr(hub, "_commit", lambda source: None)  # no network
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert prepare_data(wanted, TRAIN_TOKENIZER, cache).info.sources["train"][0]["commit"] == commit
