"""Documents out of files and docstrings, and what is said about files that cannot be read as asked."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distlm.data import lines, readers
from distlm.data.readers import Piece
from distlm.data.sources import SourceReader, UndecodableCount, check_source, files_of
from distlm.data.tables import FormatName
from distlm.errors import InfrastructureError, InputError


@dataclass(frozen=True)
class Files:
    paths: list[str]
    text_column: str = "text"
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "replace"
    format: FormatName | None = None
    column_names: list[str] | None = None
    delimiter: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    max_documents: int | None = None
    source: Literal["files"] = "files"


@dataclass(frozen=True)
class PythonDocs:
    packages: list[str] | None = field(default=None)
    max_documents: int | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    source: Literal["python-docs"] = "python-docs"


def write(path: Path, content: str | bytes) -> Files:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Files([str(path)])


def pieces(source: Files | PythonDocs) -> list[Piece]:
    return list(SourceReader(source, files_of(source)))


def documents(source: Files | PythonDocs) -> list[str]:
    return [piece.text for piece in pieces(source)]


def read(source: Files) -> list[str]:
    assert check_source(source) == []
    return documents(source)


def problem(source: Files | PythonDocs) -> str:
    """The one problem that reading meets."""
    with pytest.raises(InputError) as caught:
        (documents(source))
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_import_needs_only_the_standard_library() -> None:
    code = (
        "import sys, distlm.data.sources; print(*{m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    third_party = {name for name in run.stdout.split() if not name.startswith("_")}
    assert third_party.isdisjoint({"numpy", "pyarrow", "pydantic", "torch", "tokenizers", "transformers", "yaml"})
    assert "distlm" in third_party


@pytest.mark.parametrize("suffix", [".txt", ".text", ".md", ".tokens", ".TXT"])
def test_text_documents_are_paragraphs(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f"a{suffix}", "\ufeff \n = Title = \n \nOne,\r\ntwo.\n\n\n \t\nÄ last 秦\n")
    assert read(source) == ["= Title =", "One,\r\ntwo.", "Ä last 秦"]


def test_endless_paragraph_comes_in_pieces_that_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_PIECE_CHARACTERS", 10)
    source = write(tmp_path / "a.txt", "  line 0\nline 1\nline 2\n\nshort\n\n" + "0123456789" * 3 + "\n")
    assert [(piece.text, piece.ends_document) for piece in pieces(source)] == [
        ("line 0\nline 1\n", False),
        ("line 2", True),
        ("short", True),
        ("0123456789", False),
        ("0123456789", False),
        ("0123456789", False),
        ("", True),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json-lines"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [
        '\ufeff{"text": "a\\nb", "id": 1}',
        "",
        '{"text": null}',
        '{"text": ""}',
        '{"id": 2, "text": "\\ud83d\\ude09"}',
    ]
    assert read(write(tmp_path / f"a{suffix}", "\n".join(lines))) == ["a\nb", "", "", "😉"]


def test_csv_and_tsv_with_quotes_and_line_ends_in_fields(tmp_path: Path) -> None:
    csv = 'label,text\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,\r\n3,plain\r\n'
    assert read(write(tmp_path / "a.csv", csv)) == ['two\nlines, "quoted"', "", "plain"]
    assert read(write(tmp_path / "a.tsv", "\ufefftext\tlabel\na, b\t0\n")) == ["a, b"]
    assert read(write(tmp_path / "q.tsv", 'text\tlabel\n"open, a\t0\nsay "b"\t1\n')) == ['"open, a', 'say "b"']
    long = "x" * 200_000  # more than csv's own limit
    assert read(write(tmp_path / "b.csv", f"text\n{long}\n")) == [long]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [None if i == 7 else f"document {i}" for i in range(5000)]
    table = pa.table({"id": range(5000), "body": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1700)
    assert read(Files([str(tmp_path / "a.parquet")], text_column="body")) == [text or "" for text in texts]


def test_folders_and_globs_give_each_file_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.jsonl", ".hidden/e.txt", "sub/.f.txt", "sub/notes.pdf"):
        write(tmp_path / "data" / name, json.dumps({"text": name}))
    monkeypatch.chdir(tmp_path)

    def names(*paths: str) -> list[str]:
        return [file.name for file in files_of(Files(list(paths)))]

    assert names("data") == ["a.txt", "b.txt", "c.txt", "d.jsonl"]
    assert names("data/**/*.txt") == ["a.txt", "b.txt", "c.txt"]
    assert names("data/sub/c.txt", "data/[ab].txt", "data") == ["c.txt", "a.txt", "b.txt", "d.jsonl"]
    assert names(str(tmp_path / "data/sub"), "data/sub", "data/sub/../sub/c.txt") == ["c.txt", "d.jsonl"]
    (tmp_path / "data/sub/link.txt").symlink_to(tmp_path / "data/a.txt")
    assert names("data") == ["a.txt", "b.txt", "c.txt", "d.jsonl"]
    write(tmp_path / "data/x[1].txt", "brackets")
    assert (documents(Files(["data/x[1].txt"]))) == ["brackets"]


def test_max_documents_stops_before_later_files_are_opened(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n')
    write(tmp_path / "b.jsonl", "not JSON")
    assert (documents(Files([str(tmp_path)], max_documents=2))) == ["1", "2"]


MALFORMED: dict[str, tuple[str | bytes, list[str]]] = {
    "a.txt": ("", ["the file is empty"]),
    "blank.txt": (" \n\n", ["the file holds no records"]),
    "header.csv": ("text,label\n", ["the file holds no records"]),
    "a.jsonl:2": ('{"text": "x"}\n{"text": }\n', ["not JSON (Expecting value, column 10)", "one object on each line"]),
    "list.jsonl:1": ("[1, 2]\n", ["holds a list", "object with the key 'text'"]),
    "key.jsonl:2": ('{"text": "x"}\n{"texts": "y", "id": 1}\n', ["no column 'text'", "'texts', 'id'", "mean 'texts'?"]),
    "other.jsonl:1": ('{"body": "y"}\n', ["the columns are 'body'", "name the column of text in text_column"]),
    "number.jsonl:1": ('{"text": 3}\n', ["column 'text' holds a number, not text"]),
    "nested.jsonl:1": ('{"text": {"a": 1}}\n', ["column 'text' holds an object, not text"]),
    "half.jsonl:1": ('{"text": "a \\ud83d b"}\n', ["\\ud83d, half of a surrogate pair"]),
    "utf16.csv:1": ("text\na\n".encode("utf-16"), ["begins as UTF-16 does; set encoding: utf-16"]),
    "bytes.jsonl:2": (b'{"text": "a"}\n{"te\xffxt": "a"}\n', ["holds bytes that are not UTF-8; set encoding"]),
    "bytes.csv:1": (b"te\xffxt\na\n", ["holds bytes that are not UTF-8; set encoding"]),
    "zip.txt": (gzip.compress(b"text"), ["the file is compressed; give it a name that ends in .gz"]),
    "zip.csv": (lzma.compress(b"text"), ["the file is compressed; give it a name that ends in .xz"]),
    "column.csv:1": ("Text,label\na,b\n", ["the columns are 'Text', 'label'", "did you mean 'Text'?"]),
    "row.csv:3": ("text,label\na,b\nc, d,e\n", ["the row has 3 fields and the header has 2", "stand in quotes"]),
    "open.csv:4": ('text,label\na,b\n"never closed,c\nd,e\n', ["unexpected end of data", "written twice"]),
    "quote.csv:2": ('text,label\n"a" said,b\n', ["expected after", "convert the file to .jsonl"]),
    "a.parquet": ("PAR1 and then nothing", ["not a readable Parquet file"]),
}


@pytest.mark.parametrize("location", MALFORMED)
def test_malformed_file_is_named_with_its_line_and_a_remedy(tmp_path: Path, location: str) -> None:
    content, expected = MALFORMED[location]
    name = location.partition(":")[0]
    message = problem(write(tmp_path / name, content))
    assert message.startswith(f"{tmp_path / location}: ")
    for part in expected:
        assert part in message


def test_check_source_reports_all_files_at_once_from_their_first_records(tmp_path: Path) -> None:
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "column.csv", "body\na\n")
    write(tmp_path / "good.jsonl", '{"text": "x"}\n"found only by reading on"\n')
    problems = check_source(Files([str(tmp_path), str(tmp_path / "gone.txt")]))
    assert [Path(p.location or p.value).name for p in problems] == ["gone.txt", "column.csv:1", "empty.txt"]


def test_parquet_column_must_be_there_and_hold_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    path = [str(tmp_path / "a.parquet")]
    assert "column 'text' holds int64, not text" in problem(Files(path))
    assert "the columns are 'text', 'body'; did you mean 'body'?" in problem(Files(path, text_column="bod"))


def test_names_that_match_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "corpus/train.jsonl", '{"text": "x"}')
    write(tmp_path / "corpus/notes.pdf", "x")
    (tmp_path / "none").mkdir()
    assert "did you mean 'train.jsonl'?" in problem(Files(["corpus/trian.jsonl"]))
    assert "the folder korpus does not exist either" in problem(Files(["korpus/train.jsonl"]))
    assert f"no file matches this pattern, seen from {tmp_path}" in problem(Files(["corpus/*.txt"]))
    assert "the folder holds no file with a supported suffix (.txt" in problem(Files(["none"]))
    assert "corpus/notes.pdf: unsupported suffix; use one of .txt, " in problem(Files(["corpus/*"]))


def test_unreadable_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")  # a loop: no user can open it
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: "):
        documents(Files([str(tmp_path / "*.txt")]))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_fails_is_no_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    source = write(tmp_path / "a.txt", "a\n\nb\n\nc\n")
    next_line = lines.Lines.__next__

    def fail(reader: lines.Lines) -> str:
        if reader.number == 3:
            raise OSError(code, os.strerror(code))
        return next_line(reader)

    with monkeypatch.context() as patch:
        patch.setattr(lines.Lines, "__next__", fail)
        with pytest.raises(InfrastructureError, match=r"a\.txt: cannot be read: "):
            documents(source)

    def stat(path: Path, **more: object) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(InfrastructureError):
        files_of(source)


def test_a_name_that_is_not_unicode_can_be_told(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xc4\xe3.txt"))
    file.write_bytes(b"good\n\nb\xe9d\n")
    _, second = pieces(Files([str(tmp_path)]))
    assert second.undecodable_at == f"{tmp_path}/\\xc4\\xe3.txt:3"
    file.write_bytes(b"")
    problem(Files([str(tmp_path)])).encode()
    file.rename(file.with_suffix(".pdf"))
    problem(Files([f"{tmp_path}/*"])).encode()


# -------------------------------------------------------------------------------------------------------- python-docs


def test_docstrings_of_one_package() -> None:
    text = "\n\n".join(documents(PythonDocs(["json"])))
    doc = json.dumps.__doc__
    assert doc is not None
    assert doc.strip().splitlines()[0] in text
    assert json.JSONEncoder.__doc__ is not None
    assert "Extensible JSON <https://json.org> encoder for Python data structures." in text
    assert {file.parent.name for file in files_of(PythonDocs(["json"]))} == {"json"}


def test_docstrings_are_of_all_statements_cleaned_unique_and_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten = "one two three four five six seven eight nine"
    package = tmp_path / "package"
    code = """
        'module TEN'
        if True:
            class A:
                \'\'\'class TEN

                    indented\'\'\'
                def f(self):
                    \'\'\'method TEN\'\'\'
                    async def g():
                        \'\'\'inner TEN\'\'\'
        try:
            x = \'\'\'no docstring TEN\'\'\'
        except E:
            def h():
                \'\'\'handler TEN\'\'\'
        def same():
            \'\'\'handler TEN\'\'\'
        def short():
            \'\'\'too short\'\'\'
    """
    write(package / "__init__.py", textwrap.dedent(code).replace("TEN", ten))
    write(package / "broken.py", '"""docstring""" def')
    write(package / "tests/test_a.py", f'"""test {ten}"""')
    write(tmp_path / "alone.py", f'"""alone \\d {ten}"""')
    monkeypatch.setattr("sysconfig.get_paths", lambda: dict.fromkeys(["stdlib", "purelib", "platlib"], str(tmp_path)))
    assert documents(PythonDocs(["package"])) == [
        f"module {ten}\n\nclass {ten}\n\nindented\n\nmethod {ten}\n\ninner {ten}\n\nhandler {ten}"
    ]
    assert sorted(documents(PythonDocs()))[0] == f"alone \\d {ten}"
    assert len(documents(PythonDocs(max_documents=1))) == 1


def test_the_first_docstrings_are_of_many_packages() -> None:
    first = files_of(PythonDocs())[:300]
    folders = {file.parent for file in first}
    assert len(folders) > 60


def test_unknown_package_is_named_with_the_nearest() -> None:
    source = PythonDocs(["jsn", "ast"])
    assert [p.value for p in check_source(source)] == ["jsn"]
    assert "no such package is installed" in problem(source)
    assert "did you mean 'json'?" in problem(source)


def test_names_that_are_no_files_are_problems_and_never_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    source = Files([str(tmp_path / "pipe.jsonl"), "x" * 300 + ".txt"])
    pipe, long_name = check_source(source)
    assert pipe.message == "not a regular file"
    assert "too long" in long_name.message


# ---------------------------------------------------------------------------------------------- compression, encodings

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_read_as_they_would_uncompressed(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    texts = [f"document {i} 秦 \U0001f389" for i in range(3000)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    assert read(write(tmp_path / f"a.jsonl{suffix}", compress(lines))) == texts
    # Files that were compressed apart and then joined, as `cat` does, are one.
    half = lines.index(b"\n", len(lines) // 2) + 1
    assert read(write(tmp_path / f"b.jsonl{suffix.upper()}", compress(lines[:half]) + compress(lines[half:]))) == texts
    assert read(write(tmp_path / f"c.csv{suffix}", compress(b'id,text\n1,"a\nb"\n'))) == ["a\nb"]
    assert read(write(tmp_path / f"d.txt{suffix}", compress(b"one\n\ntwo\n"))) == ["one", "two"]
    assert "holds no records" in problem(write(tmp_path / f"e.txt{suffix}", compress(b"")))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_is_cut_short_or_none_is_refused(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps({"text": os.urandom(30).hex()}) + "\n" for _ in range(2000)).encode()
    compressed = COMPRESS[suffix](lines)
    for name, content in (("cut", compressed[: len(compressed) // 2]), ("end", compressed[:-3]), ("plain", lines)):
        path = tmp_path / f"{name}.jsonl{suffix}"
        message = problem(write(path, content))
        assert message.startswith(f"{path}: the compressed file is damaged or cut short ("), message
    assert [p.location for p in check_source(write(tmp_path / f"plain.txt{suffix}", lines))] == [
        str(tmp_path / f"plain.txt{suffix}")
    ]


def test_reading_says_how_far_it_is_in_the_file_on_the_disk(tmp_path: Path) -> None:
    texts = [os.urandom(500).hex() for _ in range(400)]
    plain = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": texts * 10}), tmp_path / "c.parquet")
    for source in (plain, packed, Files([str(tmp_path / "c.parquet")])):
        reader = SourceReader(source, files_of(source))
        seen = [reader.bytes_read for _ in reader]
        size = Path(source.paths[0]).stat().st_size
        assert seen == sorted(seen) and 0.2 * size < seen[len(seen) // 2] < 0.8 * size
        assert reader.bytes_read == reader.expected_bytes(len(seen)) == size


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "big5"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    texts = ["秦川雄帝宅", "函谷壯皇居", "ascii \n too", ""]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode(encoding)
    source = write(tmp_path / "a.jsonl", lines)
    assert read(replace(source, encoding=encoding)) == texts
    assert all(not piece.undecodable_at for piece in pieces(replace(source, encoding=encoding)))
    packed = write(tmp_path / "a.jsonl.gz", gzip.compress(lines))
    assert read(replace(packed, encoding=encoding)) == texts


def test_bytes_outside_the_encoding_are_replaced_and_located(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", b"first\n\nsecond\ncaf\xe9 and \xf0\x9f\x8e\n\nthird\n")
    assert pieces(source) == [
        Piece("first"),
        Piece("second\ncaf\ufffd and \ufffd", True, f"{tmp_path}/a.txt:4"),
        Piece("third"),
    ]
    rows = write(tmp_path / "a.csv", b'id,text\n1,"x\n\xff"\n2,y\n')
    assert pieces(rows) == [Piece("x\n\ufffd", True, f"{tmp_path}/a.csv:3"), Piece("y")]
    cut = write(tmp_path / "b.txt", "秦川雄帝宅".encode("gb18030")[:-1])
    assert pieces(replace(cut, encoding="gb18030"))[0] == Piece("秦川雄帝\ufffd", True, f"{tmp_path}/b.txt:1")
    values = pa.array([b"fine", b"caf\xe9", None], pa.binary())
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, *values.buffers()[1:], values.buffers()[0])}),
                   tmp_path / "a.parquet")  # fmt: skip
    parquet = Files([str(tmp_path / "a.parquet")])
    assert pieces(parquet) == [Piece("fine"), Piece("caf\ufffd", True, f"{tmp_path}/a.parquet:2"), Piece("")]
    assert "a.parquet:2: column 'text' holds bytes that are not UTF-8" in problem(
        replace(parquet, encoding_errors="strict")
    )


def test_strict_refuses_the_first_bytes_outside_the_encoding(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", b"\xef\xbb\xbfabc\ncaf\xe9\n")
    message = problem(replace(source, encoding_errors="strict"))
    assert message.startswith(f"{tmp_path}/a.txt:2: byte 0xe9 in column 4 is not UTF-8; set encoding to what")
    assert "bytes that are not UTF-16" not in problem(replace(source, encoding="utf-16", encoding_errors="strict"))
    assert "is not UTF-16 (UTF-16 stream does not start with BOM)" in problem(replace(source, encoding="utf-16"))


@pytest.mark.parametrize(
    ("num_bad", "num_good", "is_refused"), [(1, 0, True), (3, 1, False), (11, 1, True), (11, 1090, False)]
)
def test_check_tells_damage_from_another_encoding(
    tmp_path: Path, num_bad: int, num_good: int, is_refused: bool
) -> None:
    count = UndecodableCount()
    for number in range(num_bad + num_good):
        count.add(Piece("x", True, f"a.txt:{number}" if number < num_bad else ""))
    assert bool(count.problems("utf-8")) == is_refused
    if is_refused:
        (found,) = count.problems("utf-8")
        assert f"{num_bad} of {num_bad + num_good} documents hold bytes that are not UTF-8" in found.message
        assert (found.location, "set encoding" in found.message) == ("a.txt:0", True)


def test_check_looks_on_where_the_first_record_is_damaged(tmp_path: Path) -> None:
    assert check_source(write(tmp_path / "a.txt", b"caf\xe9\n\ngood\n")) == []
    (found,) = check_source(write(tmp_path / "b.txt", b"caf\xe9\n\n" * 30))
    assert found.message.startswith("30 of 30 documents hold bytes that are not UTF-8")
    for number in range(20):  # each begins with damage, and is good
        write(tmp_path / "shards" / f"{number}.txt", b"\xa9 header\n\n" + b"good\n\n" * 100)
    write(tmp_path / "shards/all.txt", b"caf\xe9\n\n" * 30)
    assert check_source(Files([str(tmp_path / "shards")])) == []
    (found,) = check_source(Files([str(tmp_path / "shards/0.txt")], encoding_errors="strict"))
    assert "byte 0xa9 in column 1" in found.message
    assert check_source(replace(write(tmp_path / "c.txt", b"caf\xe9\n"), encoding="latin-1")) == []


# ------------------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class HubDataset:
    path: str
    data_files: list[str] | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    streaming: bool = True
    max_documents: int | None = None
    max_gib: float = 1.0
    text_pair_column: str | None = None
    label_column: str | None = None
    source: Literal["datasets"] = "datasets"


def test_what_of_a_data_set_is_on_this_machine_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "x")
    assert check_source(HubDataset("wikimedia/wikipedia")) == []
    assert check_source(HubDataset("json", [f"{tmp_path}/*.jsonl", "https://example.org/a.jsonl"])) == []
    for source, key, message in (
        (HubDataset("json"), "path", "needs data_files"),
        (HubDataset("./gone"), "path", "no such folder"),
        (HubDataset("~"), "path", "write ${HOME} for it"),
        (HubDataset("json", [f"{tmp_path}/*.csv"]), "data_files", "no file matches"),
    ):
        (found,) = check_source(source)
        assert found.key == key and message in found.message and found.value
