"""Rows of named columns out of files and docstrings, and what is said where they cannot be read as asked."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from distlm.config.schema import FilesSource, ParallelSource, PythonDocsSource, Source
from distlm.data.rows import check_rows, label_column, labelled_columns, read_rows, text_columns
from distlm.data.sources import SourceReader, check_source, files_of
from distlm.errors import InputError


def made(**keys: Any) -> Any:
    """The source as a config gives it."""
    return TypeAdapter(Source).validate_python(keys)


def files(path: Path, content: str | bytes, **keys: Any) -> FilesSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    source = made(source="files", paths=[str(path)], **keys)
    assert isinstance(source, FilesSource)
    return source


def values(source: Any, *columns: str) -> list[list[Any]]:
    """Of the columns, by default of those that a task with labels reads."""
    wanted = list(columns) or labelled_columns(source)
    return [[row.values[column] for column in wanted] for row in read_rows(source, wanted)]


def problem(source: Any, *columns: str) -> tuple[str, str]:
    """(key, text) of the one problem that both reading and checking meet."""
    wanted = list(columns) or labelled_columns(source)
    with pytest.raises(InputError) as caught:
        list(read_rows(source, wanted))
    (found,) = caught.value.problems
    assert check_rows(source, wanted) == [found]
    return found.key, f"{found.location}: {found.message}"


def test_import_needs_only_the_standard_library() -> None:
    code = "import sys, distlm.data.rows; print(*{m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"numpy", "pyarrow", "pydantic", "torch", "datasets"}.isdisjoint(run.stdout.split())


def test_the_columns_that_a_task_with_labels_reads() -> None:
    source = made(source="files", paths=["a.csv"])
    assert (text_columns(source), label_column(source), labelled_columns(source)) == (
        ["text"], "label", ["text", "label"]
    )  # fmt: skip
    pair = made(source="files", paths=["a"], text_column="a", text_pair_column="b", label_column="c")
    assert labelled_columns(pair) == ["a", "b", "c"]
    assert text_columns(made(source="python-docs", text_pair_column="package")) == ["text", "package"]


def test_csv_rows_have_the_line_that_they_begin_in(tmp_path: Path) -> None:
    content = 'id,text,label\r\n1,"two\nlines, ""quoted""",a\r\n\r\n2,,\r\n3,"x\n\n",b\n4,y,c\n'
    source = files(tmp_path / "a.csv", content)
    assert values(source) == [['two\nlines, "quoted"', "a"], ["", ""], ["x\n\n", "b"], ["y", "c"]]
    assert [row.place for row in read_rows(source, ["label"])] == [f"{tmp_path}/a.csv:{n}" for n in (2, 5, 6, 9)]
    assert values(source, "label", "id")[0] == ["a", "1"]
    assert check_rows(source, ["text", "label"]) == []


def test_tables_with_other_delimiters_and_without_a_header(tmp_path: Path) -> None:
    two = [['say "x" & y', "0"], ["z", "1"]]
    names = {"column_names": ["text", "label"]}
    assert values(files(tmp_path / "a.tsv", 'say "x" & y\t0\n\nz\t1\n', **names)) == two
    assert values(files(tmp_path / "a.txt", 'say "x" & y@0\r\nz@1\r\n', delimiter="@", **names)) == two
    assert values(files(tmp_path / "b.txt", 'text|label\nsay "x" & y|0\nz|1', delimiter="|")) == two
    assert values(files(tmp_path / "a.csv", '"say ""x"" & y";0\nz;1\n', delimiter=";", **names)) == two
    assert values(files(tmp_path / "u.data", 'text\tlabel\nsay "x" & y\t0\nz\t1\n', format="tsv")) == two
    packed = files(tmp_path / "a.tsv.gz", gzip.compress(b'say "x" & y\t0\nz\t1\n'), **names)
    assert values(packed) == two
    latin = files(tmp_path / "l.tsv", "caf\xe9\t1\n".encode("latin-1"), encoding="latin-1", **names)
    assert values(latin) == [["café", "1"]]


def test_the_text_of_a_table_is_read_alike_for_every_task(tmp_path: Path) -> None:
    source = files(tmp_path / "a.txt", "one\n\ntwo@a\n", column_names=["text", "label"], delimiter="@")
    assert [found.location for found in check_source(source)] == [f"{tmp_path}/a.txt:1"]
    (tmp_path / "a.txt").write_text("one@b\n\ntwo@a\n")
    assert [piece.text for piece in SourceReader(source, files_of(source))] == ["one", "two"]
    assert values(source) == [["one", "b"], ["two", "a"]]


def test_lines_of_text_are_rows_of_one_column(tmp_path: Path) -> None:
    source = files(tmp_path / "a.txt", " one\r\n\n \ntwo\n")
    assert [(row.values, row.place[-1]) for row in read_rows(source, ["text"])] == [
        ({"text": " one"}, "1"),
        ({"text": "two"}, "4"),
    ]
    key, message = problem(source)
    assert key == "label_column" and "the columns are 'text'; name the column of labels in label_column" in message
    assert "unless delimiter or column_names is set" in message


def test_json_values_come_as_they_are(tmp_path: Path) -> None:
    rows: list[list[Any]] = [["a", 1], ["b", True], ["c", None], [None, 0.5], [["x", "y"], ["O", "B"]], ["", {"k": 1}]]
    lines = [json.dumps({"text": text, "label": label, "id": 1}) for text, label in rows]
    source = files(tmp_path / "a.jsonl.bz2", bz2.compress("\n\n".join(lines).encode()))
    assert values(source) == rows
    assert [row.place for row in read_rows(source, ["id"])][1] == f"{tmp_path}/a.jsonl.bz2:3"


@pytest.mark.parametrize("label", ['"a \\ud83d"', '["x", "\\ud83d"]', '{"\\ud83d": 1}'])
def test_half_a_character_is_refused_wherever_it_stands(tmp_path: Path, label: str) -> None:
    key, message = problem(files(tmp_path / "a.jsonl", f'{{"text": "x", "label": {label}}}\n'))
    assert key == "label_column" and "a.jsonl:1: column 'label' holds \\ud83d, half of a surrogate pair" in message


def test_parquet_columns_of_any_type(tmp_path: Path) -> None:
    columns = {
        "text": ["a", None] * 1000,
        "label": pa.array(["pos", "neg"] * 1000).dictionary_encode(),
        "tokens": [["x", "y"], []] * 1000,
        "score": [0.5, None] * 1000,
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=300)
    source = made(source="files", paths=[str(tmp_path)])
    assert (
        values(source, "label", "tokens", "score", "text")
        == [
            ["pos", ["x", "y"], 0.5, "a"],
            ["neg", [], None, None],
        ]
        * 1000
    )
    assert [row.place for row in read_rows(source, ["text"])][-1] == f"{tmp_path}/a.parquet:2000"


CONLL = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects  VBZ I-VP O\x20
# CD I-NP O

-DOCSTART-
Tokyo NNP I-NP I-LOC
\t
\u3000 NN I-NP O
-DOCSTART- -X- O O
秦 NN I-NP O
"""


@pytest.mark.parametrize("suffix", [".conll", ".bio", ".iob", ".iob2.xz"])
def test_sentences_of_words_with_labels(tmp_path: Path, suffix: str) -> None:
    content = CONLL.encode() if suffix != ".iob2.xz" else lzma.compress(CONLL.encode())
    source = files(tmp_path / f"a{suffix}", content, text_column="tokens", label_column="ner")
    sentences = [
        [["EU", "rejects", "#"], ["I-ORG", "O", "O"]],
        [["Tokyo"], ["I-LOC"]],
        [["\u3000"], ["O"]],
        [["秦"], ["O"]],
    ]
    assert values(source) == sentences
    assert [row.place.rpartition(":")[2] for row in read_rows(source, ["ner"])] == ["3", "8", "10", "12"]
    named = source.model_copy(update={"column_names": ["word", "pos", "chunk", "ner"]})
    assert values(named, "chunk", "word")[0] == [["I-NP", "I-VP", "I-NP"], ["EU", "rejects", "#"]]
    key, message = problem(source, "tokens", "pos")
    assert key == "" and "a" + suffix + ":3: no column 'pos'" in message


def test_tabs_separate_where_there_are_any(tmp_path: Path) -> None:
    source = files(tmp_path / "a.conll", "New York\tB-LOC\n\xa0\tO\n")
    assert values(source) == [[["New York", "\xa0"], ["B-LOC", "O"]]]


CONLLU = """# newdoc
# text = im Haus
1-2\tim\t_\t_\t_\t_\t_\t_\t_\t_
1\tin\tin\tADP\t_\t_\t3\tcase\t_\t_
2\tdem\tder\tDET\t_\t_\t3\tdet\t_\t_
2.1\tnichts\t_\tX\t_\t_\t_\t_\t_\t_
3\tHaus\tHaus\tNOUN\t_\t_\t0\troot\t_\t_

1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_
"""


def test_conllu_gives_each_word_once_and_no_comments(tmp_path: Path) -> None:
    source = files(tmp_path / "a.conllu", CONLLU, text_column="form", label_column="upos")
    assert values(source) == [[["in", "dem", "Haus"], ["ADP", "DET", "NOUN"]], [["#"], ["SYM"]]]
    assert [row.place for row in read_rows(source, ["form"])] == [f"{tmp_path}/a.conllu:{line}" for line in (4, 9)]


def test_bytes_outside_the_encoding_are_told_with_their_row(tmp_path: Path) -> None:
    source = files(tmp_path / "a.conll", b"a O\nb\xff O\n\nc O\n\nd\xff O\n")
    assert [row.undecodable_at for row in read_rows(source, ["text"])] == [
        f"{tmp_path}/a.conll:2", "", f"{tmp_path}/a.conll:6"
    ]  # fmt: skip
    parallel = made(source="parallel", columns={"text": f"{tmp_path}/x", "label": f"{tmp_path}/y"})
    (tmp_path / "x").write_bytes(b"a\nb\n")
    (tmp_path / "y").write_bytes(b"1\n\xff\n")
    (tmp_path / "z").write_bytes(b"\xff\n")
    assert [row.undecodable_at for row in read_rows(parallel, ["text", "label"])] == ["", f"{tmp_path}/y:2"]
    _, message = problem(
        parallel.model_copy(update={"encoding_errors": "strict", "columns": {"text": f"{tmp_path}/z"}}), "text"
    )
    assert f"{tmp_path}/z:1: byte 0xff in column 1 is not UTF-8" in message
    bad = files(tmp_path / "b.tsv", "caf\xe9\t1\n".encode("latin-1") * 30, column_names=["text", "label"])
    (found,) = check_rows(bad, ["text", "label"])
    assert found.message.startswith("30 of 30 documents hold bytes that are not UTF-8")


TWO = {"column_names": ["text", "label"]}
THREE = {"column_names": ["text", "label", "more"]}
MALFORMED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "label.csv:1": ("text,lable\na,b\n", {}, "label_column", "the columns are 'text', 'lable'; did you mean 'lable'?"),
    "pair.csv:1": ("text,x,label\n", {"text_pair_column": "q"}, "text_pair_column", "name it in text_pair_column"),
    "text.csv:1": ("txt,label\na,b\n", {}, "text_column", "no column 'text'; the columns are 'txt', 'label'; did you"),
    "no.tsv:1": ("a stirring film\t1\n", {}, "text_column", "those of a file without a header in column_names"),
    "key.jsonl:2": ('{"text": "x", "label": 1}\n{"text": "x"}\n', {}, "label_column", "no column 'label'"),
    "few.tsv:2": ("a\t1\nb\n", TWO, "", "the row has 1 fields and column_names has 2"),
    "many.tsv:1": ("a\t1\n", THREE, "", "the row has 2 fields and column_names has 3"),
    "at.txt:1": ("a@b@c\n", TWO | {"delimiter": "@"}, "", "has 3 fields and column_names has 2; a field that holds"),
    "twice.csv:1": ("text,label,label\n", {}, "label_column", "more than one column 'label'"),
    "a.jsonl": ("{}\n", TWO, "column_names", "the format jsonl names its columns itself"),
    "b.jsonl": ("{}\n", {"delimiter": "|"}, "delimiter", "the format jsonl has no delimiter; leave it out"),
    "a.conll:3": ("a x O\n\nb O\n", {}, "", "the line has 2 fields and the first line has 3"),
    "b.conll:1": ("a x O\n", TWO, "", "the line has 3 fields and column_names has 2"),
    "one.conll:1": ("a\n", {}, "label_column", "no column 'label'; the columns are 'text'"),
    "a.conllu:1": ("1\tx\n", {"text_column": "form", "label_column": "upos"}, "", "2 fields and CoNLL-U has 10"),
    "doc.conll": ("-DOCSTART- O\n\n", {}, "", "the file holds no records"),
    "empty.tsv": ("", {}, "", "the file is empty"),
}


@pytest.mark.parametrize("location", MALFORMED)
def test_a_file_that_cannot_be_read_as_asked_is_named_with_its_line_and_key(tmp_path: Path, location: str) -> None:
    content, keys, key, part = MALFORMED[location]
    source = files(tmp_path / location.partition(":")[0], content, **keys)
    with pytest.raises(InputError) as caught:
        list(read_rows(source, labelled_columns(source)))
    (found,) = caught.value.problems
    assert (found.location, found.key) == (str(tmp_path / location), key)
    assert part in found.message


def test_check_reads_the_first_row_of_each_file(tmp_path: Path) -> None:
    files(tmp_path / "a.csv", "text,lable\nx,y\n")
    files(tmp_path / "b.csv", "text,label\nx,y\nz\n")
    files(tmp_path / "c.conll", "x\n")
    source = made(source="files", paths=[str(tmp_path), str(tmp_path / "gone.csv")])
    found = check_rows(source, ["text", "label"])
    assert [(Path(one.location or one.value).name, one.key) for one in found] == [
        ("gone.csv", ""),
        ("a.csv:1", "label_column"),
        ("c.conll:1", "label_column"),
    ]


def test_files_of_words_are_no_documents(tmp_path: Path) -> None:
    source = files(tmp_path / "a.conll", "a O\n")
    files(tmp_path / "b.txt", "text")
    folder = made(source="files", paths=[str(tmp_path)])
    assert [file.name for file in files_of(folder)] == ["b.txt"]
    assert [file.name for file in files_of(folder, rows=True)] == ["a.conll", "b.txt"]
    assert "unsupported suffix; use one of .txt" in check_source(source)[0].message
    (found,) = check_source(source.model_copy(update={"format": "conll"}))
    assert "column 'text' holds lists of words, not text" in found.message


def test_max_documents_ends_the_rows_before_later_files_are_opened(tmp_path: Path) -> None:
    files(tmp_path / "a.jsonl", '{"text": "1"}\n{"text": "2"}\n')
    source = files(tmp_path / "b.jsonl", "not JSON").model_copy(update={"paths": [str(tmp_path)], "max_documents": 2})
    assert values(source, "text") == [["1"], ["2"]]


def test_line_i_of_each_parallel_file_is_row_i(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes("\ufeffto boston\r\n\r\nfrom 秦\n".encode())
    (tmp_path / "out.gz").write_bytes(gzip.compress(b"O B\n\nO B-\xff\n"))
    columns = {"text": str(tmp_path / "in"), "slots": str(tmp_path / "out.gz")}
    source = made(source="parallel", columns=columns, label_column="slots")
    assert isinstance(source, ParallelSource)
    assert values(source) == [["to boston", "O B"], ["", ""], ["from 秦", "O B-\ufffd"]]
    assert [row.place for row in read_rows(source, ["slots"])] == [f"{tmp_path}/out.gz:{n}" for n in (1, 2, 3)]
    assert values(source.model_copy(update={"max_documents": 1})) == [["to boston", "O B"]]
    assert files_of(source) == [tmp_path / "in", tmp_path / "out.gz"]


def test_parallel_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n3\n4\n")
    (tmp_path / "b").write_text("1\n2\n")
    columns = {"text": str(tmp_path / "a"), "label": str(tmp_path / "b")}
    source = made(source="parallel", columns=columns)
    with pytest.raises(InputError, match=f"{tmp_path}/a has 4, {tmp_path}/b has 2") as caught:
        values(source)
    assert caught.value.problems[0].key == "columns"
    assert problem(source.model_copy(update={"label_column": "labl"})) == (
        "label_column", ": no column 'labl'; the columns are 'text', 'label'; did you mean 'label'?"
    )  # fmt: skip
    gone = source.model_copy(update={"columns": {"text": str(tmp_path / "a"), "label": str(tmp_path / "c")}})
    key, message = problem(gone)
    assert key == "columns.label" and "no such file" in message


def test_docstrings_tell_the_package_that_they_are_from() -> None:
    source = made(source="python-docs", packages=["json", "ast", "pydantic"], label_column="package")
    assert isinstance(source, PythonDocsSource)
    found = list(read_rows(source, labelled_columns(source)))
    assert {row.values["package"] for row in found} == {"json", "ast", "pydantic"}
    (decoder,) = [row for row in found if row.place.endswith("json/decoder.py")]
    assert decoder.values["package"] == "json" and "Simple JSON" in decoder.values["text"]
    key, message = problem(made(source="python-docs", label_column="packag"))
    assert key == "label_column" and "did you mean 'package'?" in message
    assert problem(made(source="python-docs", packages=["jsn"], label_column="package"))[0] == ""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"delimiter": "||"}, "must be one character, and no quote"),
        ({"delimiter": '"'}, "must be one character, and no quote"),
        ({"format": "xlsx"}, "'txt', 'jsonl', 'csv', 'tsv', 'parquet', 'conll' or 'conllu'"),
        ({"column_names": []}, "at least 1 item"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(source="files", paths=["a"], **keys)


def test_the_examples_of_the_documentation_are_sources() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    section = page.partition("## Labelled data")[2].partition("\n## ")[0]
    blocks = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    sources = [made(**keys) for block in blocks for keys in yaml.safe_load(block)]
    assert len(sources) == section.count("{source:") and len({source.source for source in sources}) == 4
