"""What must not be stored, shown or executed: a canary in each place where a secret or foreign code may stand."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import CONFIG, clean_environment, make_attempt, make_run
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from distlm.config.load import load_config, load_tree
from distlm.console import exit_code_of
from distlm.controller.attempt import _copy_logs
from distlm.controller.environment import freeze
from distlm.controller.recorder import Recorder
from distlm.data.tokenize import load_tokenizer
from distlm.errors import Cause, CheckpointError, ExitCode, InfrastructureError, InputError
from distlm.outcome import Follower, Outcome, write_result
from distlm.redact import holds_secret, redact_uri
from distlm.run_folder import RunFolder, dump_yaml, whole_folder
from distlm.view import encode_event, make_event
from distlm.worker import store
from distlm.worker.adapter import _read_peft_format, adapter_folder, load_adapter
from distlm.worker.model import initial_model, load_model, pretrained_config

CANARY = "canary-7d0f1a"
URI = f"https://me:{CANARY}@mlflow.invalid"
QUERY = f"https://data.invalid/corpus.jsonl?token={CANARY}"
MESSAGE = f"cannot reach {URI}/api and {QUERY}"
URI_KEY = "tracking.tracking_uri"


# --- secrets that are written out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        URI, QUERY, f"https://{CANARY}@host", f"postgresql://me:{CANARY}@db/mlflow", "hf_" + 34 * "a",
        f"https://a.invalid/x?sig={CANARY}", f"https://a.invalid/x?X-Amz-Signature={CANARY}", f"x?api_key={CANARY}",
        "https://${USER}:" + CANARY + "@host",
    ],
)  # fmt: skip
def test_a_secret_that_is_written_out_is_known(text: str) -> None:
    assert holds_secret(text)
    assert CANARY not in redact_uri(text) and "aaaa" not in redact_uri(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://me:${WORD}@host", "https://${TOKEN}@host", "https://a.invalid/x?token=${TOKEN}", "${URI}",
        "https://host:5000/path", "abfss://container@account.invalid/x", "https://a.invalid/x?page=2&design=3",
        "org/tokenizer-key", "sqlite:////data/mlflow.db",
    ],
)  # fmt: skip
def test_what_is_none_is_not_taken_for_one(text: str) -> None:
    assert not holds_secret(text)


def write_config(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(dump_yaml({**CONFIG, **sections}))
    return path


def test_a_secret_in_the_file_is_refused_with_its_place(tmp_path: Path) -> None:
    source = {"source": "datasets", "path": "json", "data_files": [QUERY]}
    path = write_config(tmp_path, tracking={"tracking_uri": URI}, data={"train": [source]})
    lines = path.read_text().splitlines()
    where = {name: next(n for n, line in enumerate(lines, 1) if name in line) for name in ("token=", "tracking_uri")}
    with pytest.raises(InputError) as caught:
        load_config(path)
    found = {problem.key: problem for problem in caught.value.problems}
    assert found[URI_KEY].location == f"{path}:{where['tracking_uri']}"
    assert found["data.train.0.data_files.0"].location == f"{path}:{where['token=']}"
    assert all("write ${NAME} in its place" in problem.message for problem in found.values())
    assert CANARY not in str(caught.value)


def test_a_secret_in_an_override_is_refused_even_if_a_later_one_replaces_it(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with pytest.raises(InputError) as caught:
        load_config(path, [f"{URI_KEY}={URI}", f"{URI_KEY}=https://host"])
    (problem,) = caught.value.problems
    assert (problem.location, problem.key) == ("command line", URI_KEY)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("verb", [["validate"], ["submit", "--dry-run"], ["submit"]])
@pytest.mark.parametrize("override", [f"{URI_KEY}={URI}", f"--{URI_KEY}={URI}", URI, f"no_such_key={URI}"])
def test_no_command_says_what_it_refuses(tmp_path: Path, verb: list[str], override: str) -> None:
    command = [sys.executable, "-m", "distlm.cli", *verb, str(write_config(tmp_path)), override]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == ExitCode.BAD_INPUT
    assert CANARY not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_does_not_say_what_variables_hold(tmp_path: Path) -> None:
    path = write_config(tmp_path, tracking={"tracking_uri": "https://me:${WORD}@mlflow.invalid"})
    command = [sys.executable, "-m", "distlm.cli", "submit", "--dry-run", str(path)]
    environment = clean_environment(tmp_path, WORD=CANARY)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == ExitCode.SUCCEEDED
    assert "${WORD}" in done.stdout and CANARY not in done.stdout + done.stderr


# --- secrets in what libraries say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_values_of_secret_variables_are_redacted_wherever_they_stand(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, CANARY)
    assert redact_uri(f"Authorization: Bearer {CANARY}, and more") == "Authorization: Bearer ***, and more"


def test_paths_and_short_words_in_such_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLS_KEY", "/etc")
    monkeypatch.setenv("API_KEY", "test")
    assert redact_uri("a test of /etc/hosts") == "a test of /etc/hosts"


def files_below(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*")) if path.is_file())


def test_results_and_events_hold_no_secret(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = make_attempt(run)
    outcome = Outcome(
        ExitCode.INFRASTRUCTURE, MESSAGE, 1, details=f"Traceback\n{MESSAGE}", cause=Cause.INFRASTRUCTURE,
        followers=[Follower(0, MESSAGE)],
    )  # fmt: skip
    write_result(attempt, outcome, 0.0, [{"message": MESSAGE, "key": URI_KEY, "value": URI, "location": ""}])
    text = files_below(run.path)
    assert "cannot reach https://***@mlflow.invalid/api" in text and CANARY not in text
    for kind in ("warning", "note", "phase", "result"):
        event = encode_event(make_event(kind, message=MESSAGE, problems=[{"value": URI}]))
        assert "***" in event and CANARY not in event


def test_metrics_jsonl_and_so_the_tracker_get_no_secret(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    attempt = run.new_attempt()
    recorder = Recorder(run, attempt)
    failure = {"kind": "failure", "rank": 0, "message": MESSAGE, "details": MESSAGE}
    recorder.record([failure, {"kind": "event", "event": "warning", "message": MESSAGE}])
    recorder.set_tags({"distlm.overrides": f"{URI_KEY}={URI}"})
    recorder.log_dataset("train", "abc", QUERY, "training")
    recorder.close("FAILED")
    messages = [json.loads(line) for line in attempt.metrics_jsonl.read_text().splitlines()]
    assert {"failure", "event", "tags", "dataset"} <= {message["kind"] for message in messages}
    assert CANARY not in attempt.metrics_jsonl.read_text()


def test_errors_of_commands_hold_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise InfrastructureError(MESSAGE)

    assert exit_code_of(fail) == ExitCode.INFRASTRUCTURE
    error = capsys.readouterr().err
    assert "***@mlflow.invalid" in error and CANARY not in error


def test_logs_hold_no_secret(tmp_path: Path) -> None:
    """Of what libraries print and log in the controller and the workers, and of uncaught errors."""
    code = (
        "import logging, sys; from pathlib import Path; from distlm.worker.entry import redirect_output\n"
        "redirect_output(Path(sys.argv[1]))\n"
        "print(sys.argv[2]); print('a' * 20000, 'é'); print(sys.argv[2], file=sys.stderr)\n"
        "logging.warning(sys.argv[2])\n"
        "raise RuntimeError(sys.argv[2])\n"
    )
    log = tmp_path / "logs" / "rank-00000.log"
    assert subprocess.run([sys.executable, "-c", code, str(log), MESSAGE]).returncode == 1
    text = log.read_text()
    assert text.count("***@mlflow.invalid") == 4 and CANARY not in text
    assert "a" * 20000 + " é\n" in text


def test_copied_logs_of_ray_hold_no_secret(tmp_path: Path) -> None:
    (tmp_path / "ray" / "old").mkdir(parents=True)
    (tmp_path / "ray" / "old" / "worker.err").write_bytes(b"\xff " + MESSAGE.encode())
    _copy_logs(tmp_path / "ray", tmp_path / "copy")
    copied = (tmp_path / "copy" / "old" / "worker.err").read_bytes()
    assert copied.startswith(b"\xff cannot reach https://***@") and CANARY.encode() not in copied


def test_packages_from_a_private_address_are_listed_without_its_secret(tmp_path: Path) -> None:
    folder = tmp_path / "private-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: private\nVersion: 1.0\n")
    origin = {"url": f"https://{CANARY}@git.invalid/private.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    (folder / "direct_url.json").write_text(json.dumps(origin))
    assert freeze([str(tmp_path)]) == ["private @ git+https://***@git.invalid/private.git@abc"]


# --- code in what others have made -----------------------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that code of others would make."""
    return tmp_path / "ran"


@pytest.fixture
def model() -> BertForMaskedLM:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=30, max_position_embeddings=16, **shape)
    config.architectures = ["BertForMaskedLM"]
    return BertForMaskedLM(config)


def malicious_model(model: BertForMaskedLM, folder: Path, ran: Path) -> Path:
    model.config.save_pretrained(folder)
    torch.save({**model.state_dict(), "more": Touch(ran)}, folder / "pytorch_model.bin")
    return folder


def change_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_the_canary_works(ran: Path, tmp_path: Path) -> None:
    torch.save(Touch(ran), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert ran.exists()


def test_a_pickle_among_the_weights_is_not_run(model: BertForMaskedLM, ran: Path, tmp_path: Path) -> None:
    folder = str(malicious_model(model, tmp_path / "model", ran))
    config = load_tree({**CONFIG, "model": {"name_or_path": folder}, "data": CONFIG["data"]}).config
    with pytest.raises(InputError, match=r"model\.name_or_path.*a pickle that holds more than tensors"):
        initial_model(config, pretrained_config(folder, "masked-lm"))
    with pytest.raises(OSError, match="safetensors"):  # in the folder of a run
        load_model(Path(folder), None)
    assert not ran.exists()


def test_python_code_beside_a_model_is_not_run(model: BertForMaskedLM, ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    change_json(folder / "config.json", model_type="mine", auto_map=auto_map)
    with pytest.raises(InputError, match="it needs Python code of its own, which is never run"):
        pretrained_config(str(folder), "masked-lm")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto_map}))
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(folder))
    assert not ran.exists()


def test_an_attention_kernel_that_a_model_names_is_not_loaded(model: BertForMaskedLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(InputError, match="asks for an attention kernel of its own, which is never run"):
        pretrained_config(str(tmp_path / "model"), "masked-lm")


def test_an_adapter_runs_nothing(model: BertForMaskedLM, ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    peft_model.save_pretrained(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.weight": Touch(ran)}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_name_or_path.*a pickle that holds more than tensors"):
        _read_peft_format(peft_model, folder)
    change_json(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="somebody")
    with pytest.raises(InputError, match="names a Python module to import"):
        adapter_folder(str(folder))
    with pytest.raises(CheckpointError, match="names a Python module to import"):
        load_adapter(model, folder)
    assert not ran.exists()


def test_yaml_makes_no_objects(ran: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text() + f'env: !!python/object/apply:os.system ["touch {ran}"]\n')
    with pytest.raises(InputError, match="no tags that create objects"):
        load_config(path)
    assert not ran.exists()


# --- where it listens, and for whom its files are --------------------------------------------------------------------


@pytest.mark.parametrize(("address", "bound_to"), [("127.0.0.1", "127.0.0.1"), ("192.0.2.1", "0.0.0.0")])
def test_torchs_store_listens_on_the_address_of_rank_0_alone(
    address: str, bound_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all only where the address is not one of this host, but leads to it."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    port = store.listen(address)
    assert store._listener is not None
    assert store._listener.getsockname() == (bound_to, port)
    store.meet_at("127.0.0.1", port)
    store.listen_at("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    early = socket.create_connection(("127.0.0.1", port), 5)  # it waits for the store
    store.serve()
    torch.distributed.TCPStore("127.0.0.1", port, is_master=False).set("key", "value")
    assert torch.distributed.TCPStore("127.0.0.1", port, is_master=False).get("key") == b"value"
    early.close()
    monkeypatch.setattr(store, "_store", None)


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_of_a_run_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run = make_run(tmp_path / "runs")
        attempt = make_attempt(run)
        Recorder(run, attempt).close("FINISHED")
        code = "import sys, pathlib, distlm.worker.entry as entry; entry.redirect_output(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(attempt.controller_log)], check=True)
        write_result(attempt, Outcome(ExitCode.SUCCEEDED), None)
        with whole_folder(run.init) as folder:
            save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    assert {"metrics.jsonl", "model.safetensors", "controller.log", "attempt.yaml"} <= {
        path.name for path in run.path.rglob("*")
    }
    for path in [run.path, *run.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
