"""What a run makes of prepared data: shares of the sources, and the refusal of what another version has prepared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import CONFIG, english

from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.data.corpus import are_held_out
from distlm.data.notes import notes
from distlm.data.pack import PackedDataset
from distlm.errors import InputError
from distlm.run_folder import RunFolder, read_json, write_json
from distlm.worker.prepare import prepare_run, sample_order


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "run")


def config(tmp_path: Path, *weights: float | None) -> RunConfig:
    sources: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        path = tmp_path / f"{number}.txt"
        if not path.exists():
            path.write_text(english(20 * (number + 1), seed=number), encoding="utf-8")
        sources.append({"source": "files", "paths": [str(path)], "weight": weight})
    tree = CONFIG | {"data": {"train": sources, "max_seq_length": 32, "validation_fraction": 0.1}}
    return load_tree(tree, check=contradictions).config


def test_weights_decide_the_share_of_each_source(tmp_path: Path, run: RunFolder) -> None:
    weighted = config(tmp_path, 3.0, 1.0)
    prepared = prepare_run(weighted, run)
    first, second = prepared.train_mixture
    total = prepared.num_train_samples
    assert first["num_samples"] + second["num_samples"] == total
    assert first["share"] == pytest.approx(0.75, abs=0.6 / total) and second["share"] == pytest.approx(
        1 - first["share"]
    )
    assert first["passes_per_epoch"] == pytest.approx(first["share"] * total / first["num_samples"], abs=1e-5)
    dataset = PackedDataset([Path(path) for path in prepared.train_paths])
    assert dataset.sizes == [first["num_samples"], second["num_samples"]]
    order = sample_order(weighted, dataset.sizes)
    _, indices = order.samples(0, total)
    assert (indices < first["num_samples"]).mean() == pytest.approx(first["share"], abs=1e-5)
    # The blocks do not depend on the weights, so another mixture tokenizes nothing.
    other = prepare_run(config(tmp_path, 1.0, 1.0), RunFolder.create(run.runs_dir, "other"))
    assert other.data_was_cached and other.train_mixture[0]["share"] == pytest.approx(0.5, abs=0.6 / total)
    plain = prepare_run(config(tmp_path, None, None), RunFolder.create(run.runs_dir, "plain"))
    assert plain.train_mixture[0]["share"] == pytest.approx(first["num_samples"] / total, abs=1e-5)
    assert [source["passes_per_epoch"] for source in plain.train_mixture] == [1.0, 1.0]


def test_a_source_with_a_weight_and_no_text_is_refused(tmp_path: Path, run: RunFolder) -> None:
    weighted = config(tmp_path, 1.0, 1.0)
    (tmp_path / "1.txt").write_text("\u200b\n")  # no token comes of it
    with pytest.raises(InputError) as caught:
        prepare_run(weighted, run)
    (found,) = caught.value.problems
    assert found.key == "data.train.1.weight" and "no training sample" in found.message


def test_a_source_that_is_held_out_as_a_whole_is_refused_or_told(tmp_path: Path, run: RunFolder) -> None:
    size = next(number for number, is_held_out in enumerate(are_held_out(0.1)) if is_held_out and number > 5)

    def held_out(*weights: float | None) -> RunConfig:
        chosen = config(tmp_path, *weights)
        (tmp_path / "0.txt").write_text(english(size, seed=0), encoding="utf-8")
        (tmp_path / "1.txt").write_text("one document")
        return chosen

    with pytest.raises(InputError) as caught:
        prepare_run(held_out(1.0, 1.0), run)
    (found,) = caught.value.problems
    assert found.key == "data.validation_fraction"
    assert found.message.startswith("all of the 1 documents of data.train.1, which has a weight, were held out; lower")
    told = list(notes(prepare_run(held_out(None, None), run).data_info["sources"]))
    assert f"data: {tmp_path}/1.txt: all of its text was held out for validation, none is trained" in told


def test_a_run_keeps_its_tokenizer(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_run(config(tmp_path, None), run)
    shutil.rmtree(run.cache)
    os.utime(tmp_path / "0.txt", ns=(0, 0))
    monkeypatch.setattr("distlm.data.prepare.train_tokenizer", None)
    again = prepare_run(config(tmp_path, None), run)
    assert not again.data_was_cached
    assert again.data_info["tokenizer_fingerprint"] == first.data_info["tokenizer_fingerprint"]


def test_data_of_another_version_is_not_what_the_run_began_with(tmp_path: Path, run: RunFolder) -> None:
    plain = config(tmp_path, None)
    prepare_run(plain, run)
    prepared = read_json(run.init / "prepared.json")
    assert prepare_run(plain, run).data_was_cached
    prepared["data_info"] = {"format_version": 1, "fingerprint": "x"}  # and other fields than today's
    write_json(run.init / "prepared.json", prepared)
    with pytest.raises(InputError, match=r"^data: .*is not what this run began with, so its samples"):
        prepare_run(plain, run)
