"""Checkpoint folders that were damaged in every way: what is whole is found, all else is refused, nothing is run.

Every accepted checkpoint is read and compared with what its step must hold, whatever was done to it.
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fabricated import SMALL, read, save_for_ever, state, write

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.errors import CheckpointError, UnknownFormatError, UnreadableError

STEPS = (3, 5, 8, 13)
SHARDS = ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors")
FILES = (*SHARDS, MANIFEST_NAME)
LOSSES = {3: 2.0, 5: 1.0, 8: 3.0}
HANG_S = 120.0


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """A test that waits for ever ends the process with every thread's stack."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of `STEPS`."""
    store = CheckpointStore(tmp_path_factory.mktemp("pristine") / "checkpoints")
    store.clean()
    for step in STEPS:
        write(store, step, metrics={"eval/loss": LOSSES[step]} if step in LOSSES else None)
    return store.folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A private copy, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def is_right(checkpoint: Checkpoint, manifest: Manifest) -> bool:
    return read(checkpoint, manifest) == state(checkpoint.step, SMALL)


def accepts(checkpoint: Checkpoint) -> bool:
    """Whether `verify` takes it; then it must hold what its step must hold. Refusals are one line of bounded length."""
    store = CheckpointStore(checkpoint.path.parent)
    for look in (store.manifest, store.check, store.verify):
        try:
            manifest = look(checkpoint)
        except CheckpointError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 1000, text
            assert str(checkpoint.path) in text
            return False
    assert is_right(checkpoint, manifest)
    return True


def is_of_another_format(checkpoint: Checkpoint) -> bool:
    try:
        CheckpointStore(checkpoint.path.parent).manifest(checkpoint)
    except UnknownFormatError:
        return True
    except CheckpointError:
        pass
    return False


def require_consistent(folder: Path) -> Checkpoint | None:
    """All answers of the store agree on what is whole, and deleting and clearing keeps it. Returns the latest good."""
    store = CheckpointStore(folder)
    found = store.checkpoints()
    assert [c.step for c in found] == sorted({c.step for c in found}, reverse=True)
    good = [checkpoint for checkpoint in found if accepts(checkpoint)]
    latest, skipped = store.latest_good()
    assert latest == (good[0] if good else None)
    assert len(skipped) == (found.index(latest) if latest else len(found))
    store.best("eval/loss", False)

    store.prune(1)
    assert store.latest_good()[0] == latest
    if latest:
        older = [checkpoint for checkpoint in store.checkpoints() if checkpoint.step < latest.step]
        assert all(is_of_another_format(checkpoint) for checkpoint in older)
    store.clean()
    assert not store.unfinished()
    after = store.latest_good()[0]
    assert (after and after.step) == (latest and latest.step)
    return latest


# --- damage -----------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 3, 50))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice((1, 4, 1000))))


def overwrite(path: Path, draw: random.Random) -> None:
    start = draw.randrange(path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(draw.randbytes(draw.choice((1, 8, 64))))


def make_sparse(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.choice((2**30, 2**40)))


def replace_with(make: Callable[[Path, random.Random], Any]) -> Callable[[Path, random.Random], None]:
    def replace(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path, draw)

    return replace


def another_file(path: Path, draw: random.Random) -> Path:
    return path_of(path.parent.parent, draw.choice(STEPS)) / draw.choice(FILES)


def copy_another(path: Path, draw: random.Random) -> None:
    source = another_file(path, draw)
    if is_plain(source.parent) and source.is_file():
        shutil.copyfile(source, path)


def pickle_bomb(path: Path, draw: random.Random) -> None:
    path.write_bytes(pickle.dumps(Payload(marker_of(path.parent.parent))))


def plant(path: Path, draw: random.Random) -> None:
    """Files that other tools would unpickle, beside those of the checkpoint."""
    for name in ("data.pkl", "pytorch_model.bin", "optimizer.pt", "__init__.py", "shard-00002-of-00003.safetensors"):
        pickle_bomb(path.parent / name, draw)


def marker_of(folder: Path) -> Path:
    return folder.parent / "executed"


FILE_DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip, flip, flip, cut, cut, extend, overwrite, make_sparse, plant,
    replace_with(lambda path, draw: None),
    replace_with(lambda path, draw: path.touch()),
    replace_with(lambda path, draw: path.mkdir()),
    replace_with(lambda path, draw: path.symlink_to("nowhere")),
    replace_with(lambda path, draw: path.symlink_to(path.name)),
    replace_with(lambda path, draw: path.symlink_to(another_file(path, draw))),
    replace_with(lambda path, draw: path.symlink_to("/dev/zero")),
    replace_with(lambda path, draw: os.mkfifo(path)),
    replace_with(copy_another), replace_with(pickle_bomb),
)  # fmt: skip

NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 2**64, 10**4000, 1.5, 1e308, float("nan"), float("inf"), "", "x",
    "1", "../../etc/passwd", "a\0b", "a\nb", "\ud800", "ü" * 50, "x" * 100_000, [], {}, [[]], [0, 0, 1], {"a": 1}, [-1],
    [2**62] * 64, [10**4000] * 200, [1] * 100_000,
)  # fmt: skip


def rehash(content: dict[str, Any]) -> str:
    """The text of a manifest whose own SHA-256 is right."""
    content = {key: value for key, value in content.items() if key != "manifest_sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest(), **content})


def mutate(value: Any, draw: random.Random) -> Any:
    """One thing somewhere in a JSON value replaced, removed, repeated, swapped or added."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        match draw.randrange(12):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[draw.choice(("unknown", "a\0b", "../x", "shard-00009-of-00002.safetensors"))] = value[key]
            case 1:
                value.append(value[key])
            case 2 if isinstance(value, dict):
                other = draw.choice(list(value))
                value[key], value[other] = value[other], value[key]
            case 2:
                draw.shuffle(value)
            case _:
                value[key] = mutate(value[key], draw)
        return value
    if type(value) is int and draw.random() < 0.5:
        return value + draw.choice((-value - 1, -1, 1, 4, 2**40))
    return draw.choice(NASTY)


def damage_manifest(path: Path, draw: random.Random) -> None:
    """Alter it somewhere; mostly with its own hash made right again."""
    content = mutate(json.loads(path.read_text()), draw)
    is_forged = isinstance(content, dict) and draw.random() < 0.8
    path.write_text(rehash(content) if is_forged else json.dumps(content))


def split_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def forge_shard(path: Path, header: bytes, data: bytes) -> None:
    """Write a shard, and its size and hash into the manifest."""
    content = len(header).to_bytes(8, "little") + header + data
    path.write_bytes(content)
    manifest = json.loads((path.parent / MANIFEST_NAME).read_text())
    manifest["shards"][path.name] |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path.parent / MANIFEST_NAME).write_text(rehash(manifest))


def damage_header(path: Path, draw: random.Random) -> None:
    header, data = split_shard(path)
    forge_shard(path, json.dumps(mutate(header, draw)).encode(), data)


def is_plain(path: Path) -> bool:
    """Whether we can read these files ourselves: they are no pipes, links or sparse giants yet."""
    files = [path / name for name in FILES]
    return all(not f.is_symlink() and (not f.exists() or (f.is_file() and f.stat().st_size < 2**20)) for f in files)


def damage_checkpoint(folder: Path, draw: random.Random) -> None:
    path = path_of(folder, draw.choice(STEPS[1:]))
    if not is_plain(path):
        return
    damage = draw.choice((*FILE_DAMAGES, *[damage_manifest] * 12, *[damage_header] * 8))
    name = MANIFEST_NAME if damage is damage_manifest else draw.choice(SHARDS if damage is damage_header else FILES)
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged too much to be damaged so
        damage(path / name, draw)


def damage_folder(folder: Path, draw: random.Random) -> None:
    """Something among the checkpoints."""
    step, other = draw.choice(STEPS[1:]), draw.choice(STEPS)
    path = path_of(folder, step)
    match draw.randrange(11):
        case 0 if is_plain(path_of(folder, other)):
            shutil.copytree(path_of(folder, other), path_of(folder, 99))
        case 1 if path.is_dir():
            path.rename(folder / f".{path.name}.old")
        case 2 if path.is_dir():
            path.rename(folder / draw.choice((f".{path.name}.tmp-3fa9c1", f".{path.name}.deleted-77", "step-abc")))
        case 3:
            (folder / "step-00000007").write_text("a file")
        case 4:
            (folder / "step-00000021").symlink_to(draw.choice(("nowhere", "step-00000021", path_of(folder, other))))
        case 5:
            os.mkfifo(folder / "step-00000034")
        case 6:
            (folder / f".step-00000008.tmp-{draw.randrange(9)}").touch()
        case 7:
            (folder / f".step-00000013.deleted-{draw.randrange(9)}").symlink_to(path_of(folder, 3))
        case 8:
            for name in ("step-00000005.bak", "step-5", "step-000000013", "step-٠٠٠٠٠٠١٣", "step--0000001", "latest"):
                (folder / name).mkdir(exist_ok=True)
        case 9:
            (folder / "step-00000055").mkdir()
            (folder / f".{path.name}.old").touch()
        case _:
            (folder / "step-99999999").mkdir()


def is_untouched(folder: Path, pristine: Path, step: int) -> bool:
    """Whether the bytes of its files are those that were written."""
    here, there = path_of(folder, step), path_of(pristine, step)
    files = [(here / name, there / name) for name in FILES]
    return all(
        copy.is_file() and not copy.is_symlink() and copy.stat().st_size == original.stat().st_size
        and copy.read_bytes() == original.read_bytes() for copy, original in files
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(500))
def test_what_is_whole_is_found_and_all_else_is_refused(pristine: Path, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 2, 4))):
        with suppress(OSError):  # such a thing is there already
            draw.choice((damage_checkpoint, damage_checkpoint, damage_folder))(folder, draw)
    newest_untouched = max(step for step in STEPS if is_untouched(folder, pristine, step))
    latest = require_consistent(folder)
    assert latest is not None and latest.step >= newest_untouched
    assert not marker_of(folder).exists()


# --- one by one -------------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], Any]


def first_shard(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["shards"][SHARDS[0]]
    return found


def nest(manifest: dict[str, Any]) -> None:
    inner = manifest["optimizer"]["groups"][0]
    for _ in range(600):
        inner["a"] = {}
        inner = inner["a"]


def rename_shard(name: str) -> Edit:
    return lambda manifest: manifest["shards"].update({name: manifest["shards"].pop(SHARDS[0])})


FORGED_MANIFESTS: dict[str, tuple[Edit, str]] = {
    "negative size": (lambda m: first_shard(m).update(size_bytes=-1), "greater than or equal to 0"),
    "huge size": (lambda m: first_shard(m).update(size_bytes=2**62), "the manifest says 4611686018427387904"),
    "huge number": (lambda m: first_shard(m)["fragments"][0].__setitem__(2, 10**4000), "less than 9223372036854775808"),
    "overlap": (lambda m: first_shard(m)["fragments"][0].__setitem__(2, 26), "bert.a is there twice at element 25"),
    "gap": (lambda m: first_shard(m)["fragments"][0].__setitem__(2, 24), "bert.a is missing at element 24"),
    "beyond the end": (lambda m: m["parameters"][0].update(shape=[49]), "covers 50 of 49 elements of bert.a"),
    "huge shape": (lambda m: m["parameters"][0].update(shape=[2**62] * 64), "covers 50 of "),
    "many dimensions": (lambda m: m["parameters"][0].update(shape=[1] * 100_000), "at most 64 items"),
    "a number as text": (lambda m: m["progress"].update(sample_position="48"), "progress.sample_position"),
    "a number as bool": (lambda m: m["progress"].update(epoch=True), "progress.epoch"),
    "a whole number as float": (lambda m: m["optimizer"].update(adam_step=1.0), "optimizer.adam_step"),
    "not a number": (lambda m: m.update(metrics={"eval/loss": float("nan")}), "metrics.eval/loss"),
    "deep nesting": (nest, "recursion"),
    "a name twice": (lambda m: m["parameters"].append(m["parameters"][0]), "names a parameter twice"),
    "another name": (lambda m: m["parameters"][0].update(name="bert.z"), "does not hold the tensors"),
    "a name of many lines": (lambda m: m["parameters"][0].update(name="a\n\x1b[2J\0" * 9999), "does not hold"),
    "no such parameter": (lambda m: first_shard(m)["fragments"][0].__setitem__(0, 9), "of parameter 9, and there are"),
    "no shards": (lambda m: m.update(shards={}), "covers 0 of 50 elements of bert.a"),
    "out of the folder": (rename_shard("../step-00000005/" + SHARDS[0]), "should match pattern"),
    "an absolute path": (rename_shard("/dev/zero"), "should match pattern"),
    "a line end": (rename_shard(SHARDS[0] + "\n"), "should match pattern"),
    "a NUL": (rename_shard(SHARDS[0] + "\0"), "should match pattern"),
    "an over-long name": (rename_shard("shard-" + "0" * 5000 + "-of-00002.safetensors"), "wrong at shards.shard-00000"),
    "another rank": (rename_shard("shard-00002-of-00002.safetensors"), "No such file"),
    "an unknown key": (lambda m: m.update(pickle="x"), "pickle: Extra inputs"),
    "a missing key": (lambda m: m.pop("seed"), "seed: Field required"),
    "another step": (lambda m: m.update(step=14), "is of step 14, not 13: the folder was renamed"),
    "an old version": (lambda m: m.update(format_version=1), "has format version 1, and this distlm reads 2"),
    "a version of many lines": (lambda m: m.update(format_version="\n" * 10_000), "has format version"),
    "a lone surrogate": (lambda m: m["versions"].update(torch="\ud800"), "is wrong at"),
    "not hashed again": (lambda m: m.update(manifest_sha256="0" * 64), "does not match its own SHA-256"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED_MANIFESTS)
def test_a_forged_manifest_is_refused(folder: Path, case: str) -> None:
    edit, reason = FORGED_MANIFESTS[case]
    path = path_of(folder, 13) / MANIFEST_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content) if case == "not hashed again" else rehash(content))
    checkpoint = Checkpoint(13, path_of(folder, 13))
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        CheckpointStore(folder).verify(checkpoint)
    assert not accepts(checkpoint)
    assert require_consistent(folder) == Checkpoint(8, path_of(folder, 8))


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, '{"manifest_sha256": ' + "9" * 9999 + "}",
        '{"manifest_sha256": null, "format_version": {}}', "\0" * 1000, '{"format_version": 2} trailing',
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (path_of(folder, 13) / MANIFEST_NAME).write_text(text)
    assert not accepts(Checkpoint(13, path_of(folder, 13)))
    assert require_consistent(folder) == Checkpoint(8, path_of(folder, 8))


def swap(header: dict[str, Any], first: str, second: str) -> None:
    header[first], header[second] = header[second], header[first]


def shift(header: dict[str, Any]) -> None:
    """The second tensor over the first: as long as before, and within the file."""
    first, second = list(header.values())[1:3]
    length = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + length]


def entry(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["bert.a:weight:0"]
    return found


FORGED_HEADERS: dict[str, tuple[Edit, str]] = {
    "overlapping": (shift, "does not begin where the tensor before it ends"),
    "another dtype": (lambda h: entry(h).update(dtype="I32"), "does not hold the tensors"),
    "a dtype of another size": (lambda h: entry(h).update(dtype="F16"), "does not fit its shape"),
    "an unknown dtype": (lambda h: entry(h).update(dtype="F4"), "KeyError: 'F4'"),
    "another shape": (lambda h: entry(h).update(shape=[5, 5]), "does not hold the tensors"),
    "swapped names": (lambda h: swap(h, "bert.a:weight:0", "bert.a:exp_avg:0"), "does not hold the tensors"),
    "a missing tensor": (lambda h: h.pop("bert.d:exp_avg_sq:0"), "its tensors end at byte"),
    "an extra tensor": (lambda h: h.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "not hold"),
    "beyond the file": (lambda h: entry(h).update(shape=[2**40], data_offsets=[0, 2**42]), "numbers within the file"),
    "negative": (lambda h: entry(h).update(data_offsets=[-100, 0]), "numbers within the file"),
    "not whole": (lambda h: entry(h).update(data_offsets=[0, 100.0]), "numbers within the file"),
    "huge numbers": (lambda h: entry(h).update(shape=[10**4000] * 100), "numbers within the file"),
    "many dimensions": (lambda h: entry(h).update(shape=[2] * 300_000), "numbers within the file"),
    "no entry": (lambda h: h.update({"bert.a:weight:0": 7}), "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED_HEADERS)
def test_a_forged_shard_is_refused(folder: Path, case: str) -> None:
    edit, reason = FORGED_HEADERS[case]
    path = path_of(folder, 13) / SHARDS[0]
    header, data = split_shard(path)
    edit(header)
    forge_shard(path, json.dumps(header).encode(), data)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        CheckpointStore(folder).verify(Checkpoint(13, path_of(folder, 13)))
    assert require_consistent(folder) == Checkpoint(8, path_of(folder, 8))


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, "{}".encode("utf-16"), b"\x80\x04N."]
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, header: bytes) -> None:
    path = path_of(folder, 13) / SHARDS[1]
    forge_shard(path, header, split_shard(path)[1])
    assert require_consistent(folder) == Checkpoint(8, path_of(folder, 8))


def test_huge_files_cost_neither_time_nor_memory(folder: Path) -> None:
    """Sparse files of a TiB, also where the manifest says so."""
    shard = path_of(folder, 13) / SHARDS[0]
    os.truncate(shard, 2**40)
    manifest = json.loads((path_of(folder, 13) / MANIFEST_NAME).read_text())
    first_shard(manifest)["size_bytes"] = 2**40
    (path_of(folder, 13) / MANIFEST_NAME).write_text(rehash(manifest))
    os.truncate(path_of(folder, 8) / MANIFEST_NAME, 2**40)
    tracemalloc.start()
    started = time.monotonic()
    assert require_consistent(folder) == Checkpoint(5, path_of(folder, 5))
    assert time.monotonic() - started < 10
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_only_the_names_that_the_store_writes_are_checkpoints(folder: Path) -> None:
    for name in ("step-abc", "step-00000099.bak", "step-000000099", "step-99", "step-٠٠٠٠٠٠٩٩", "Step-00000099"):
        shutil.copytree(path_of(folder, 13), folder / name)
    (folder / "step-00000099").write_text("a file")
    (folder / "step-00000098").symlink_to("nowhere")
    assert [checkpoint.step for checkpoint in CheckpointStore(folder).checkpoints()] == sorted(STEPS, reverse=True)


def test_a_replaced_checkpoint_counts_while_its_successor_is_missing(folder: Path) -> None:
    old = folder / ".step-00000013.old"
    path_of(folder, 13).rename(old)
    path_of(folder, 13).symlink_to("nowhere")
    assert CheckpointStore(folder).latest_good()[0] == Checkpoint(13, old)
    CheckpointStore(folder).clean()
    assert CheckpointStore(folder).latest_good()[0] == Checkpoint(13, path_of(folder, 13)) and not old.exists()


def test_leftovers_of_any_kind_stand_in_nobodys_way(folder: Path) -> None:
    """Where a save, a deletion or a start would put something, something is already."""
    store = CheckpointStore(folder)
    kept = path_of(folder, 3)
    for name in (".step-00000005.old", f".step-00000005.deleted-{os.getpid()}", ".step-00000021.old"):
        shutil.copytree(kept, folder / name)
    path_of(folder, 21).symlink_to("nowhere")
    (folder / f".step-00000008.deleted-{os.getpid()}").symlink_to(kept)
    write(store, 5)
    write(store, 21)
    assert [path.name for path in store.prune(1)] == [
        "step-00000013",
        "step-00000008",
        "step-00000005",
        "step-00000003",
    ]
    assert [path.name for path in folder.iterdir()] == ["step-00000021"]
    assert accepts(Checkpoint(21, path_of(folder, 21)))


def test_a_folder_that_cannot_be_read_is_no_empty_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find nothing would be to train from the beginning."""
    assert CheckpointStore(folder / "missing").latest_good() == (None, [])

    def fail(path: Path) -> Iterator[Path]:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    store = CheckpointStore(folder)
    for question in (store.checkpoints, store.latest_good, store.clean, lambda: store.prune(1)):
        with pytest.raises(CheckpointError, match="Input/output error"):
            question()


def fail_to_stat(patch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    real = os.stat

    def stat(of: Any, **options: Any) -> os.stat_result:
        if Path(of) == path:
            raise OSError(code, os.strerror(code))
        return real(of, **options)

    patch.setattr(os, "stat", stat)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_the_storage_does_not_tell_of_is_not_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fail_to_stat(monkeypatch, path_of(folder, 13), code)
    store = CheckpointStore(folder)
    for question in (store.checkpoints, store.latest_good, lambda: store.prune(1)):
        with pytest.raises(UnreadableError, match=os.strerror(code)):
            question()


@pytest.mark.parametrize("name", [MANIFEST_NAME, SHARDS[0]])
def test_what_cannot_be_read_at_the_moment_is_not_deleted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It was the best one, and nobody can tell now."""
    store = CheckpointStore(folder)
    assert store.best("eval/loss", False) == Checkpoint(5, path_of(folder, 5))
    with monkeypatch.context() as patch:
        fail_to_stat(patch, path_of(folder, 5) / name, errno.EIO)
        best = store.best("eval/loss", False)
        assert best == Checkpoint(3, path_of(folder, 3))
        store.prune(1, best)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [13, 5, 3]
    store.prune(1, store.best("eval/loss", False))
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [13, 5]


def test_deleting_reads_no_large_file_where_one_was_just_committed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when a newer one is damaged, which would be found again at each save."""
    flip(path_of(folder, 13) / SHARDS[0], random.Random(0))
    store = CheckpointStore(folder)
    write(store, 9)

    def fail(*_: object) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr("distlm.checkpoint.store.file_sha256", fail)
    store.prune(2)
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [13, 9]


# --- storage that fails in the middle of a save -----------------------------------------------------------------------


class FailingStorage:
    """Makes the n-th call of one function of the operating system fail, as a full or broken disk does."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, code: int) -> None:
        self._real, self._countdown, self._code = getattr(owner, name), number, code
        patch.setattr(owner, name, self)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else lambda *arguments: self(instance, *arguments)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._countdown -= 1
        if self._countdown == 0:
            raise OSError(self._code, os.strerror(self._code))
        return self._real(*arguments, **options)


# One save: both shards, the manifest and its folder are synced; what is replaced moves out and the new one in; then the
# folder of all checkpoints is synced.
CALLS = [(os, "fsync", number) for number in range(1, 6)] + [(Path, "rename", number) for number in (1, 2)]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize(("owner", "name", "number"), CALLS)
@pytest.mark.parametrize("step", [13, 21])
def test_a_save_that_fails_anywhere_leaves_what_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, code: int, step: int
) -> None:
    if (step, name, number) == (21, "rename", 2):
        pytest.skip("nothing is replaced, so there is one rename")
    store = CheckpointStore(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        FailingStorage(patch, owner, name, number, code)
        with pytest.raises(CheckpointError) as caught:
            write(store, step)
    assert os.strerror(code) in str(caught.value) and str(caught.value).isprintable()
    assert "step-" in str(caught.value)
    store.discard(store.temporary(step, "token"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert require_names(folder) == [f"step-{s:08d}" for s in STEPS]
    assert store.latest_good()[0] == Checkpoint(13, path_of(folder, 13))
    write(store, step)
    assert accepts(Checkpoint(step, path_of(folder, step)))
    assert len(require_names(folder)) == len({*STEPS, step}), "no temporary folder, nothing replaced is left"


def require_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_takes_bytes_only_in_part_is_written_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2) may take less than it is given; then comes the error."""

    class Reluctant(io.FileIO):
        room = 10**9

        def write(self, content: Any) -> int:
            if Reluctant.room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(content[: min(97, Reluctant.room)])
            Reluctant.room -= written
            return written

    monkeypatch.setattr(
        "distlm.checkpoint.tensor_file.open",
        lambda path, mode, buffering=-1: (Reluctant if mode == "xb" else io.FileIO)(path, mode),
        raising=False,
    )
    store = CheckpointStore(folder)
    write(store, 21)
    assert accepts(Checkpoint(21, path_of(folder, 21)))
    Reluctant.room = 1000
    with pytest.raises(CheckpointError, match=r"cannot write .*shard-0000.*No space left on device$"):
        write(store, 34)
    assert store.latest_good()[0] == Checkpoint(21, path_of(folder, 21))


# --- kills ------------------------------------------------------------------------------------------------------------

NUM_KILLS = 200
LARGE = {"embedding": [1000, 120], "weight": [300, 300], "bias": [7]}
"""Shards of 1.2 MB."""


def test_killed_at_any_moment_nothing_committed_is_lost(tmp_path: Path) -> None:
    draw = random.Random(20240229)
    folder = tmp_path / "checkpoints"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["distlm.checkpoint.reader"])  # so that a process starts at once
    announced, left = 0, Counter[str]()
    for number in range(NUM_KILLS):
        delay_s = draw.uniform(0.0, 0.15)
        receiver, sender = processes.Pipe(duplex=False)
        writer = processes.Process(target=save_for_ever, args=(folder, LARGE, sender))
        writer.start()
        sender.close()
        assert receiver.recv() is None  # it begins; how long a process takes to start is not what is tested
        time.sleep(delay_s)  # the moment is
        writer.kill()
        writer.join()
        with suppress(EOFError):
            while True:
                announced = receiver.recv()
        receiver.close()
        left.update(re.sub(r"[0-9]+|-[0-9a-z]+$", "", path.name) for path in folder.glob(".*"))

        store = CheckpointStore(folder)
        latest, skipped = store.latest_good()
        told = f"kill {number} after {delay_s:.4f} s: announced {announced}, found {latest}, {skipped}"
        assert not skipped, told
        assert (latest.step if latest else 0) in (announced, announced + 1), told
        if latest:
            assert read(latest, store.manifest(latest)) == state(latest.step, LARGE), told
            announced = latest.step  # it may have been killed before it could say so, and so may the next one
    print(f"{NUM_KILLS} kills, {announced} steps, left behind: {dict(left)}")
    assert announced > NUM_KILLS / 4, "the processes got on"
    assert left[".step-.tmp"] > NUM_KILLS / 20, "many were hit in the middle of a save"
