"""`distlm predict` and `distlm evaluate` on runs of every task: what they write, and how they go on after a kill."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from labelled_runs import LabelledRun, reviews, sentences, write_conll, write_csv, write_jsonl
from place import wait_until
from tiny_runs import make_base

from distlm.errors import CheckpointError, ExitCode
from distlm.inference import parts
from distlm.run_folder import RunFolder
from distlm.tasks.scores import tagging
from distlm.tasks.tags import TagScheme
from distlm.worker.trained_model import load_trained_model

ROOT = Path(__file__).parents[2]
NUM_PARTS = 6


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def distlm(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "distlm.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment(), **options,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def in_process(capsys: pytest.CaptureFixture[str], verb: str, run: RunFolder, *arguments: object) -> str:
    """The output of a command that succeeds, in this process, which has imported everything."""
    code, out, err = ended(capsys, verb, run, *arguments)
    assert code == ExitCode.SUCCEEDED, err
    return out


def ended(capsys: pytest.CaptureFixture[str], verb: str, run: RunFolder, *arguments: object) -> tuple[int, str, str]:
    from distlm.inference import evaluate, predict

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    capsys.readouterr()
    try:
        main = {"predict": predict.main, "evaluate": evaluate.main}[verb]
        code = main([str(run.path), *map(str, arguments)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys: pytest.CaptureFixture[str], verb: str, run: RunFolder, *arguments: object) -> str:
    code, out, err = ended(capsys, verb, run, *arguments)
    assert (code, out) == (ExitCode.BAD_INPUT, ""), err
    return err.removeprefix("distlm: ").strip()


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, encoding="utf-8", newline="") as file:
        quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        return list(csv.DictReader(file, **quoting))


def metrics_in_training(trained: LabelledRun, step: int) -> dict[str, float]:
    (values,) = [
        values
        for at, values in trained.finished.reports
        if at == step and any(key.startswith("eval/") for key in values)
    ]
    return {key.removeprefix("eval/"): value for key, value in values.items() if key.startswith("eval/")}


# --- what is predicted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "pair", "multi", "regression", "words"])
@pytest.mark.parametrize("step", [6, 12])
def test_an_evaluation_gives_what_training_gave(
    name: str, step: int, labelled_runs: dict[str, LabelledRun], capsys: pytest.CaptureFixture[str]
) -> None:
    trained = labelled_runs[name]
    text = in_process(capsys, "evaluate", trained.run, trained.validation, "--step", step, "--json")
    found = json.loads(text)
    expected = metrics_in_training(trained, step)
    assert found["metrics"] == pytest.approx(expected, rel=1e-6)
    assert (found["step"], found["num_rows"], found["unknown_labels"]) == (step, 40, {})


@pytest.mark.parametrize("name", ["single", "pair"])
def test_labels_and_scores(
    name: str, labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = labelled_runs[name]
    in_process(capsys, "predict", trained.run, trained.validation, "--out", tmp_path / "p.jsonl", "--step", 6)
    rows = rows_of(tmp_path / "p.jsonl")
    right = [row["label"] == row["predicted_label"] for row in rows]
    assert np.mean(right) == pytest.approx(metrics_in_training(trained, 6)["accuracy"])
    assert all(0.5 <= row["score"] <= 1 for row in rows)
    before = rows_of(trained.validation)
    assert [{name: row[name] for name in before[0]} for row in rows] == before, "order, columns, ids that come twice"
    assert list(rows[0]) == [*before[0], "predicted_label", "score"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "p.jsonl"]


def test_several_labels(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = labelled_runs["multi"]
    for name in ("p.jsonl", "p.csv", "p.parquet"):
        in_process(capsys, "predict", trained.run, trained.validation, "--out", tmp_path / name)
    rows = rows_of(tmp_path / "p.jsonl")
    for row in rows:
        assert set(row["scores"]) == {"good", "long"}
        assert row["predicted_labels"] == [label for label, score in row["scores"].items() if score >= 0.5]
    right = [sorted(row["labels"]) == sorted(row["predicted_labels"]) for row in rows]
    assert np.mean(right) == pytest.approx(metrics_in_training(trained, 12)["accuracy"])
    in_csv = rows_of(tmp_path / "p.csv")
    assert [json.loads(row["predicted_labels"]) for row in in_csv] == [row["predicted_labels"] for row in rows]
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == rows


def test_numbers(labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = labelled_runs["regression"]
    in_process(capsys, "predict", trained.run, trained.validation, "--out", tmp_path / "p.tsv")
    rows = rows_of(tmp_path / "p.tsv")
    errors = [float(row["prediction"]) - float(row["stars"]) for row in rows]
    assert np.mean(np.square(errors)) == pytest.approx(metrics_in_training(trained, 12)["mse"], rel=1e-4)


def test_labels_of_words(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = labelled_runs["words"]
    for name in ("p.jsonl", "p.conll", "p.csv"):
        in_process(capsys, "predict", trained.run, trained.validation, "--out", tmp_path / name)
    rows = rows_of(tmp_path / "p.jsonl")
    found = tagging([row["label"] for row in rows], [row["labels"] for row in rows], TagScheme.IOB2)
    expected = metrics_in_training(trained, 12)
    assert found.metrics == pytest.approx({key: value for key, value in expected.items() if key != "loss"})
    sentences_ = (tmp_path / "p.conll").read_text().split("\n\n")[:-1]
    fields = [[line.split("\t") for line in sentence.splitlines()] for sentence in sentences_]
    assert [[word[0] for word in sentence] for sentence in fields] == [row["text"] for row in rows]
    assert [[word[-1] for word in sentence] for sentence in fields] == [row["labels"] for row in rows]
    assert {len(word) for sentence in fields for word in sentence} == {4}, "columns of the input, and the label"
    assert [row["labels"].split() for row in rows_of(tmp_path / "p.csv")] == [row["labels"] for row in rows]


# --- strange input ---------------------------------------------------------------------------------------------------


def test_quotes_line_ends_and_empty_texts(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ['He said "great",\nand left', "", "  ", "line\r\nend", "great " * 10_000, "\u2028 ü 漢字", "ends in a \\"]
    data = write_csv(tmp_path / "in.csv", [{"id": 7, "text": text, "label": "", "stars": ","} for text in texts])
    in_process(capsys, "predict", labelled_runs["single"].run, data, "--out", tmp_path / "p.csv")
    rows = rows_of(tmp_path / "p.csv")
    assert [row["text"] for row in rows] == texts
    assert {row["predicted_label"] for row in rows} <= {"pos", "neg"} and {row["stars"] for row in rows} == {","}
    refused = refusal(capsys, "predict", labelled_runs["single"].run, data, "--out", tmp_path / "p.tsv")
    assert refused.startswith(f"{data}:2: the row holds a tab or a line end")
    again = in_process(
        capsys, "evaluate", labelled_runs["single"].run, tmp_path / "p.csv", "--label-column", "predicted_label"
    )
    assert ["accuracy", "1"] in [line.split() for line in again.splitlines()], "what is written can be read"


def test_texts_of_many_words_and_of_none(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for sentence, _ in sentences(1500, 3) for word in sentence][:10_000]
    texts: list[Any] = [words, [], "Ann met Bo", None, ["", "\u200b", "x" * 500], ["Ann"]]
    data = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    in_process(capsys, "predict", labelled_runs["words"].run, data, "--out", tmp_path / "p.jsonl")
    labels = [row["labels"] for row in rows_of(tmp_path / "p.jsonl")]
    assert [len(found) for found in labels] == [10_000, 0, 3, 0, 3, 1]
    assert all(label for found in labels for label in found), "no word is lost"
    # Sentences inside a long text are labelled as they are alone, but near the edges of the windows.
    short = write_conll(tmp_path / "one.conll", sentences(1, 3))
    in_process(capsys, "predict", labelled_runs["words"].run, short, "--out", tmp_path / "one.jsonl")
    assert len(rows_of(tmp_path / "one.jsonl")[0]["labels"]) == 7


def test_columns_of_other_names(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("The film was great\n\nThe film was dull\n")
    in_process(capsys, "predict", labelled_runs["single"].run, tmp_path / "in.txt", "--out", tmp_path / "a.jsonl")
    assert [row["text"] for row in rows_of(tmp_path / "a.jsonl")] == ["The film was great", "The film was dull"]
    (tmp_path / "in.csv").write_text("1;The film was great\n2;The film was dull\n")
    layout = ["--delimiter", ";", "--column-names", "n,review", "--text-column", "review"]
    in_process(
        capsys, "predict", labelled_runs["single"].run, tmp_path / "in.csv", "--out", tmp_path / "b.jsonl", *layout
    )
    both = [rows_of(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert [row["score"] for row in both[0]] == [row["score"] for row in both[1]]
    assert list(both[1][0]) == ["n", "review", "label", "score"]
    rows = [{"text": "a", "label": 1, "predicted_label": 2}, {"text": "b", "extra": {"x": [1]}}]
    data = write_jsonl(tmp_path / "in.jsonl", rows)
    in_process(capsys, "predict", labelled_runs["single"].run, data, "--out", tmp_path / "c.jsonl")
    found = rows_of(tmp_path / "c.jsonl")
    assert [{key: row[key] for key in before} for row, before in zip(found, rows, strict=True)] == rows
    assert all("predicted_predicted_label" in row for row in found)


def test_bad_rows_are_named(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = labelled_runs["single"].run, ["--out", tmp_path / "p.jsonl"]
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}])
    refused = refusal(capsys, "predict", run, data, *out)
    assert refused.startswith(f"{data}:2: --text-column: no column 'text'; the columns are 'txt'")
    data = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": ["b"]}])
    assert refusal(capsys, "predict", run, data, *out).startswith(f"{data}:2: --text-column: the row holds a list")
    (tmp_path / "c.csv").write_text("id,text\n1,a\n2,b,c\n")
    assert refusal(capsys, "predict", run, tmp_path / "c.csv", *out).startswith(
        f"{tmp_path / 'c.csv'}:3: the row has 3"
    )
    assert "no such file" in refusal(capsys, "predict", run, tmp_path / "d.csv", *out)
    refused = refusal(capsys, "predict", run, tmp_path / "c.csv", "--out", tmp_path / "p.xlsx")
    assert "use one of .jsonl, .csv, .tsv, .parquet" in refused
    assert not (tmp_path / "p.jsonl").exists()


# --- going on --------------------------------------------------------------------------------------------------------


@contextmanager
def held_at_last_parts(
    tmp_path: Path, run: RunFolder, data: Path, output: Path, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """A command of one worker or two that predicts NUM_PARTS parts: each worker is at one of the last two until it is
    killed, since their rows are pipes that nobody writes to. So no machine is too fast for the kill."""
    folder = parts.Parts.beside(output).folder
    held = [folder / f"rows-{number:06d}.jsonl" for number in range(NUM_PARTS - 2, NUM_PARTS)]
    command = [sys.executable, "-m", "distlm.cli", "predict", run.path, data, "--out", output, *options]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:

        def is_there(pattern: str, count: int) -> bool:
            assert process.poll() is None, process.communicate()
            return len(list(folder.glob(pattern))) == count

        try:
            wait_until(lambda: is_there("about.json", 1), 200, "the rows of all parts")
            for rows in held:
                shutil.copy(rows, tmp_path)
                os.mkfifo(tmp_path / "pipe")
                (tmp_path / "pipe").replace(rows)
            wait_until(lambda: is_there("part-*", NUM_PARTS - 2), 200, "the parts before the last two")
            yield process
        finally:
            process.kill()
    for rows in held:
        (tmp_path / rows.name).replace(rows)


def test_killed_and_gone_on(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = labelled_runs["single"].run
    data = write_csv(tmp_path / "in.csv", reviews(NUM_PARTS * parts.ROWS_PER_PART - 5, 5))
    in_process(capsys, "predict", run, data, "--out", tmp_path / "whole.csv")
    output = tmp_path / "p.csv"
    with held_at_last_parts(tmp_path, run, data, output) as process:
        process.kill()
    assert not output.exists()
    first = tmp_path / "p.csv.parts" / "part-000000.jsonl"
    written_ns = first.stat().st_mtime_ns
    left = shutil.copytree(tmp_path / "p.csv.parts", tmp_path / "q.csv.parts")

    code, out, err = ended(capsys, "predict", run, data, "--out", output)
    assert code == 0 and "going on: " in err, err
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "p.csv.parts").exists()

    # Of another step, the parts are no use.
    assert (left / first.name).stat().st_mtime_ns == written_ns
    code, out, err = ended(capsys, "predict", run, data, "--out", tmp_path / "q.csv", "--step", "6")
    assert code == 0 and "beginning anew" in err and "step 6 of" in out
    assert (tmp_path / "q.csv").read_bytes() != output.read_bytes()
    assert "exists; remove it" in refusal(capsys, "predict", run, data, "--out", output)


def test_a_worker_that_is_killed(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = labelled_runs["single"].run
    data = write_csv(tmp_path / "in.csv", reviews(NUM_PARTS * parts.ROWS_PER_PART, 6))
    output = tmp_path / "p.jsonl"
    with held_at_last_parts(tmp_path, run, data, output, "--workers", "2") as process:
        below = psutil.Process(process.pid).children(recursive=True)
        next(child for child in below if "_PartWorker" in " ".join(child.cmdline())).kill()
        _, err = process.communicate(timeout=100)
    *_, line = err.splitlines()
    assert process.returncode == ExitCode.INFRASTRUCTURE and line.startswith("distlm: a worker failed: "), err
    assert all(told.startswith("distlm: ") for told in err.splitlines()), err
    assert not [child for child in below if child.is_running()]
    in_process(capsys, "predict", run, data, "--out", output)
    assert [row["id"] for row in rows_of(output)] == [row["id"] for row in rows_of(data)]


def test_two_workers(labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = labelled_runs["words"]
    data = write_conll(tmp_path / "in.conll", sentences(3 * parts.ROWS_PER_PART - 1000, 4))
    in_process(capsys, "predict", trained.run, data, "--out", tmp_path / "one.conll")
    done = distlm("predict", trained.run.path, data, "--out", tmp_path / "two.conll", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("distlm: ") for line in done.stderr.splitlines()), done.stderr
    assert (tmp_path / "two.conll").read_bytes() == (tmp_path / "one.conll").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.conll", "one.conll", "two.conll"]


def test_parts_of_others_are_left_alone(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = labelled_runs["single"]
    (tmp_path / "p.csv.parts").mkdir()
    refused = refusal(capsys, "predict", trained.run, trained.validation, "--out", tmp_path / "p.csv")
    assert "p.csv.parts is in the way" in refused
    (tmp_path / "p.csv.parts").rmdir()
    with parts.Parts.beside(tmp_path / "p.csv").locked():
        refused = refusal(capsys, "predict", trained.run, trained.validation, "--out", tmp_path / "p.csv")
    assert "another process is predicting into" in refused


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_labels_that_training_did_not_have(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = reviews(30, 9)
    for row in rows[:3]:
        row["label"] = "neutral"
    files = [write_csv(tmp_path / "a.csv", rows[:15]), write_csv(tmp_path / "b.csv", rows[15:])]
    text = in_process(capsys, "evaluate", labelled_runs["single"].run, *files, "--out", tmp_path / "tables")
    assert "on 30 rows of" in text and text.count("\n") > 8
    assert "labels that training did not have, which count as wrong: neutral (3)" in text
    assert "neutral" in (tmp_path / "tables" / "per_label.csv").read_text()
    found = json.loads(in_process(capsys, "evaluate", labelled_runs["single"].run, *files, "--json"))
    assert found["unknown_labels"] == {"neutral": 3} and found["metrics"]["accuracy"] <= 0.9
    rows[0]["labels"] = ["good", "new"]
    data = write_jsonl(tmp_path / "c.jsonl", rows)
    found = json.loads(in_process(capsys, "evaluate", labelled_runs["multi"].run, data, "--json"))
    assert found["unknown_labels"] == {"new": 1}


def test_parallel_files(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = labelled_runs["words"].run
    rows = sentences(20, 8)
    words, labels = tmp_path / "seq.in", tmp_path / "seq=out"
    words.write_text("".join(f"{' '.join(row[0])}\n" for row in rows))
    labels.write_text("".join(f"{' '.join(row[1])}\n" for row in rows))
    text = in_process(capsys, "evaluate", run, f"text={words}", f"label={labels}", "--json")
    table = write_jsonl(tmp_path / "rows.jsonl", [{"text": row[0], "label": row[1]} for row in rows])
    expected = json.loads(in_process(capsys, "evaluate", run, table, "--json"))
    found = json.loads(text)
    assert found["num_rows"] == 20 and found["metrics"] == expected["metrics"]
    for arguments, message in (
        ([f"text={words}"], "no column 'label'; the columns are 'text'"),
        ([f"text={words}", f"text={labels}"], "name one file for each column, COLUMN=FILE"),
        ([f"text={words}", labels], "name one file for each column, COLUMN=FILE"),
        ([f"text={words}", f"label={labels}", "--delimiter=;"], "--delimiter = ;: is for tables"),
        ([f"text={words}", f"label={tmp_path}/nope"], "nope: no such file or folder"),
        ([words], "unsupported suffix"),
    ):
        assert message in refusal(capsys, "evaluate", run, *arguments)


def test_tags_in_another_scheme(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sentences(20, 8)
    bioes = [(words, [tag.replace("B-", "S-") for tag in tags]) for words, tags in rows]
    found = [
        json.loads(
            in_process(capsys, "evaluate", labelled_runs["words"].run, write_conll(tmp_path / name, some), "--json")
        )
        for name, some in (("iob2.conll", rows), ("bioes.conll", bioes))
    ]
    assert found[0]["metrics"] == found[1]["metrics"] and found[1]["unknown_labels"] == {}
    strange = write_conll(tmp_path / "pos.conll", [(["Ann"], ["NNP"])])
    assert "the data has others: 'NNP'" in refusal(capsys, "evaluate", labelled_runs["words"].run, strange)


def test_runs_that_cannot_be_used(
    labelled_runs: dict[str, LabelledRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "masked")
    base.run.run_yaml.write_text("task: {type: masked-lm}\n")
    for verb in ("predict", "evaluate"):
        arguments = ["--out", tmp_path / "p.jsonl"] if verb == "predict" else []
        refused = refusal(capsys, verb, base.run, labelled_runs["single"].validation, *arguments)
        assert "trains masked-lm" in refused and "fill-mask" in refused
    refused = refusal(capsys, "evaluate", labelled_runs["single"].run, labelled_runs["single"].validation, "--step", 7)
    assert refused == "run single has no checkpoint of step 7; it has 6, 12"


def test_a_checkpoint_of_another_model(labelled_runs: dict[str, LabelledRun], tmp_path: Path) -> None:
    shutil.copytree(labelled_runs["single"].run.path, tmp_path / "single")
    shutil.rmtree(tmp_path / "single" / "init" / "model")
    shutil.copytree(labelled_runs["multi"].run.init / "model", tmp_path / "single" / "init" / "model")
    model, tokenizer, step = load_trained_model(RunFolder(tmp_path / "single"), "last")  # the shapes are the same
    assert step == 12 and len(tokenizer) and not model.training
    shutil.rmtree(tmp_path / "single" / "init" / "model")
    shutil.copytree(labelled_runs["regression"].run.init / "model", tmp_path / "single" / "init" / "model")
    with pytest.raises(CheckpointError, match=r"classifier.* has the shape \[2"):
        load_trained_model(RunFolder(tmp_path / "single"), "last")
