"""Which run and which attempt a job goes on with that carries its files, or that its target begins again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from made_runs import CONFIG, end, held_lease, make_attempt, make_run

from distlm.config.attempt import Attempt, load_attempt
from distlm.errors import Cancelled, ExitCode, InfrastructureError, InputError, Preempted
from distlm.job_run import (
    JobName,
    changes_by_config,
    config_of_job,
    final_code,
    next_attempt,
    run_of_config,
    run_of_files,
)
from distlm.launchers.base import Job
from distlm.launchers.carried import RESULT_PREFIX, carried_files, known_newest_step, result_line
from distlm.launchers.ray import RayLauncher
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json, write_yaml

NAME = JobName("kubernetes", "distlm/distlm-tiny")


def save(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def begin(run: RunFolder, attempt: AttemptFolder, name: JobName = NAME) -> None:
    """As far as to its controller."""
    steps = [int(path.name[5:]) for path in run.checkpoints.glob("step-*")]
    Job(name.target, name.id, from_step=max(steps, default=0)).write(attempt)
    write_json(attempt.handle_json, {"host": "head", "pid": 1, "temporary_root": ""})


def following(run: RunFolder, max_starts: int = 3) -> AttemptFolder:
    return next_attempt(run, NAME, RayLauncher().check, "the head was lost", (), lambda _: max_starts)


# --- files that travel -----------------------------------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path: Path) -> RunFolder:
    """The run where it was sent from."""
    run = make_run(tmp_path / "of-the-client")
    make_attempt(run, "training.save_steps=7")
    return run


@pytest.fixture
def there(tmp_path: Path, sent: RunFolder) -> Path:
    """The run's folder on the cluster."""
    return tmp_path / "of-the-cluster" / sent.run_id


def test_the_run_and_its_attempt_are_made(sent: RunFolder, there: Path) -> None:
    run = run_of_files(there, carried_files(sent, "/storage"), NAME)
    (attempt,) = run.attempts()
    assert load_attempt(run, attempt).config.training.save_steps == 7
    assert Attempt.read(attempt).working_directory == "/storage"
    assert following(run) == attempt


@pytest.mark.parametrize("has_written_its_job", [True, False])
def test_who_sees_the_same_folder_needs_nothing_made(sent: RunFolder, has_written_its_job: bool) -> None:
    """But for where the config's relative paths are seen from there."""
    if has_written_its_job:
        Job(NAME.target, NAME.id, address="there").write(sent.attempts()[0])
    assert run_of_files(sent.path, carried_files(sent, "/storage"), NAME) == sent
    (attempt,) = sent.attempts()
    assert Attempt.read(attempt).working_directory == "/storage"
    assert following(sent) == attempt


def test_a_job_that_begins_again_gets_no_attempt_of_its_files(sent: RunFolder, there: Path) -> None:
    files = carried_files(sent)
    run = run_of_files(there, files, NAME)
    begin(run, run.attempts()[0])
    end(run.attempts()[0], ExitCode.PREEMPTED)
    run_of_files(there, files, NAME)
    assert len(run.attempts()) == 1 and following(run).number == 2


def test_a_later_job_gets_an_attempt_after_those_that_were_made_there(sent: RunFolder, there: Path) -> None:
    """The first job had two attempts there, and its sender knows of one."""
    run = run_of_files(there, carried_files(sent), NAME)
    begin(run, run.attempts()[0])
    second = following(run)
    begin(run, second)
    end(second, ExitCode.PREEMPTED)
    end(sent.attempts()[0], ExitCode.PREEMPTED)
    make_attempt(sent, "training.max_steps=200")
    later = JobName("kubernetes", "distlm/distlm-tiny-002")
    run_of_files(there, carried_files(sent), later)
    assert [attempt.number for attempt in run.attempts()] == [1, 2, 3]
    assert final_code(run) is None
    assert load_attempt(run, run.attempts()[-1]).config.training.max_steps == 200


def test_an_attempt_of_a_job_that_has_vanished_is_ended(sent: RunFolder, there: Path) -> None:
    run = run_of_files(there, carried_files(sent), NAME)
    begin(run, run.attempts()[0])
    run_of_files(there, carried_files(sent), JobName("kubernetes", "distlm/another"))
    assert read_json(run.attempts()[0].result_json)["exit_code"] == ExitCode.INFRASTRUCTURE
    assert len(run.attempts()) == 2


def test_a_run_that_is_trained_there_is_left_alone(
    sent: RunFolder, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlm.job_run._LEASE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("distlm.job_run._LEASE_INTERVAL_S", 0.1)
    run = run_of_files(there, carried_files(sent), NAME)
    begin(run, run.attempts()[0])
    with held_lease(run), pytest.raises(InputError, match="is being trained by process"):
        run_of_files(there, carried_files(sent), JobName("kubernetes", "distlm/another"))
    assert len(run.attempts()) == 1


def test_a_run_with_steps_does_not_begin_anew_on_other_storage(sent: RunFolder, there: Path) -> None:
    save(sent, 40)
    with pytest.raises(InputError, match="was sent with step 40 saved, which is not in"):
        run_of_files(there, carried_files(sent), NAME)
    save(RunFolder(there), 40)
    assert run_of_files(there, carried_files(sent), NAME).attempts()


def test_steps_that_are_out_of_sight_are_known_by_the_result(sent: RunFolder, there: Path) -> None:
    run = run_of_files(there, carried_files(sent), NAME)
    save(run, 30)
    end(run.attempts()[0], ExitCode.PREEMPTED, "stopped")
    told = json.loads(result_line(run).removeprefix(RESULT_PREFIX))
    assert (told["exit_code"], told["message"]) == (ExitCode.PREEMPTED, "stopped")
    write_json(sent.attempts()[0].result_json, told)
    assert known_newest_step(sent) == 30
    assert carried_files(sent)["newest_step"] == "30"


# --- a config --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def begin_by_config(config: Path, overrides: list[str], name: JobName = NAME) -> tuple[RunFolder, AttemptFolder]:
    """The next start of a job that was given a config."""
    run = run_of_config(config, overrides, name, may_have_begun=True)
    tree = config_of_job(config, overrides, name)
    attempt = next_attempt(run, name, RayLauncher().check, "lost", changes_by_config(run, tree, name))
    write_yaml(attempt.job_config_yaml, tree)
    begin(run, attempt, name)
    return run, attempt


def test_a_job_of_the_same_name_has_one_run(config_file: Path) -> None:
    run, _ = begin_by_config(config_file, [])
    again, second = begin_by_config(config_file, [])
    assert (again, second.number, Attempt.read(second).changes) == (run, 2, [])
    assert begin_by_config(config_file, [], JobName("kubernetes", "distlm/other"))[0] != run


def test_what_the_config_says_otherwise_comes_with_the_next_attempt(config_file: Path) -> None:
    given = ["training.max_steps=300", "kubernetes.worker_pods=2", "tracking.experiment_name=größer 🙂"]
    run, _ = begin_by_config(config_file, [])
    _, attempt = begin_by_config(config_file, given)
    config = load_attempt(run, attempt).config
    assert (config.training.max_steps, config.kubernetes.worker_pods) == (300, 2)
    assert config.tracking.experiment_name == "größer 🙂"
    assert changes_by_config(run, config_of_job(config_file, given, NAME), NAME) == [], "they are in force"
    _, back = begin_by_config(config_file, [])
    assert load_attempt(run, back).config.training.max_steps == 100, "what is taken out of it is taken back"


def test_mappings_of_others_come_whole(config_file: Path) -> None:
    run, _ = begin_by_config(config_file, ["kubernetes.env={A: a, B: b}", "kubernetes.node_selector={x.y/z: c}"])
    _, attempt = begin_by_config(config_file, ["kubernetes.env={A: a}", "kubernetes.node_selector={x.y/z: d}"])
    settings = load_attempt(run, attempt).config.kubernetes
    assert (settings.env, settings.node_selector) == ({"A": "a"}, {"x.y/z": "d"})


PRETRAINED = ["tokenizer={}", "model={name_or_path: bert-base-uncased}"]


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ([], ["seed=7"], "seed"),
        ([], ["model.config.hidden_size=128"], "model.config.hidden_size"),
        (["model.config.hidden_size=128"], [], "model.config.hidden_size"),
        (PRETRAINED, ["tokenizer={}", "model={name_or_path: x}"], "model.name_or_path"),
        ([*PRETRAINED, "peft={peft_type: lora, r: 4}"], PRETRAINED, "peft"),
    ],
)
def test_a_config_of_another_run_is_refused(config_file: Path, before: list[str], now: list[str], key: str) -> None:
    """Even where the first one has succeeded: to say so would be to say that this one was trained."""
    run, attempt = begin_by_config(config_file, before)
    end(attempt, ExitCode.SUCCEEDED)
    with pytest.raises(InputError, match=rf"{key}\S*: cannot be changed on resume[\s\S]*give it another name"):
        changes_by_config(run, config_of_job(config_file, now, NAME), NAME)


def test_a_reference_to_another_run_is_compared_as_it_is_written(config_file: Path) -> None:
    """The run itself has it pinned, and newer runs of that name may come."""
    trained = make_run(Path("runs"), 1, name="pretraining")
    make_attempt(trained)
    save(trained, 10)
    override = ["model={name_or_path: run:pretraining}", "tokenizer={}"]
    run, attempt = begin_by_config(config_file, override)
    assert load_attempt(run, attempt).config.model.name_or_path == f"run:{trained.run_id}@10"
    save(make_run(Path("runs"), 2, name="pretraining"), 20)
    _, second = begin_by_config(config_file, override)
    assert load_attempt(run, second).config.model.name_or_path == f"run:{trained.run_id}@10"
    with pytest.raises(InputError, match=r"model\.name_or_path: cannot be changed"):
        begin_by_config(config_file, ["model={name_or_path: run:another}", "tokenizer={}"])


def test_changes_of_an_attempt_that_was_refused_come_again(config_file: Path) -> None:
    run, first = begin_by_config(config_file, [])
    end(first, ExitCode.SUCCEEDED)
    _, refused = begin_by_config(config_file, ["training.max_steps=200", "deepspeed.zero_stage=3"])
    end(refused, ExitCode.BAD_INPUT)
    _, third = begin_by_config(config_file, ["training.max_steps=200"])
    config = load_attempt(run, third).config
    assert (config.training.max_steps, config.deepspeed.zero_stage) == (200, 2)


def test_changes_come_too_where_the_attempt_before_has_not_begun(config_file: Path) -> None:
    run, _ = begin_by_config(config_file, [])
    waits = following(run)
    _, attempt = begin_by_config(config_file, ["training.max_steps=200"])
    assert attempt.number == waits.number + 1 and waits.result_json.exists()
    assert load_attempt(run, attempt).config.training.max_steps == 200


@pytest.mark.parametrize(("saves", "code"), [(True, ExitCode.PREEMPTED), (False, ExitCode.CANCELLED)])
def test_what_the_user_asked_to_end_is_not_begun_again(config_file: Path, saves: bool, code: ExitCode) -> None:
    """The head was lost before the controller could act on it."""
    run, attempt = begin_by_config(config_file, [])
    write_json(attempt.cancel_json, {"save": saves})
    with pytest.raises((Preempted, Cancelled), match="asked to end by distlm cancel; the head was lost") as error:
        following(run)
    assert error.value.exit_code == read_json(attempt.result_json)["exit_code"] == code
    assert len(run.attempts()) == 1


def test_a_pod_that_ends_is_no_request_of_the_user(config_file: Path) -> None:
    run, attempt = begin_by_config(config_file, [])
    write_json(attempt.cancel_json, {"save": True, "reason": "the head pod is about to end"})
    assert following(run).number == 2


def test_under_slurm_a_script_may_be_sent_again_by_hand(config_file: Path) -> None:
    run, attempt = begin_by_config(config_file, [])
    end(attempt, ExitCode.PREEMPTED)
    waits = make_attempt(run)
    Job("slurm", "17").write(waits)
    assert next_attempt(run, JobName("slurm", "18"), RayLauncher().check, "lost") == waits


def test_an_attempt_that_waits_for_another_job_is_left_to_it(config_file: Path) -> None:
    run, attempt = begin_by_config(config_file, [])
    end(attempt, ExitCode.PREEMPTED)
    Job("slurm", "17").write(make_attempt(run))
    with pytest.raises(InputError, match="is to go on in another job, slurm 17"):
        following(run)


# --- starts in vain --------------------------------------------------------------------------------------------------


def begin_start(run: RunFolder, number: int) -> None:
    """The job's n-th start runs the newest attempt."""
    steps = [int(path.name[5:]) for path in run.checkpoints.glob("step-*")]
    Job(NAME.target, NAME.id, number, max(steps, default=0)).write(run.attempts()[-1])
    write_json(run.attempts()[-1].handle_json, {"host": "head", "pid": 1, "temporary_root": ""})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = make_run(tmp_path / "runs", resources={"num_workers": 2, "target": "kubernetes"})
    make_attempt(run)
    return run


def test_a_job_that_saves_nothing_in_its_starts_ends(run: RunFolder) -> None:
    save(run, 10)
    for number in (0, 1):
        begin_start(run, number)
        assert following(run).number == number + 2
    begin_start(run, 2)
    with pytest.raises(InfrastructureError, match="no step was saved in 3 starts"):
        following(run)
    assert [read_json(one.result_json)["exit_code"] for one in run.attempts()] == [3, 3, 3]


def test_starts_on_other_clusters_are_counted_by_their_maker(run: RunFolder) -> None:
    """KubeRay, which begins anew where a RayJob is deleted and applied again."""
    for number in range(6):
        begin_start(run, number)
        job = Job.read(run.attempts()[-1])
        assert job is not None
        replace(job, ray_cluster=f"distlm-tiny-{number // 3}").write(run.attempts()[-1])
        if number % 3 == 2:
            with pytest.raises(InfrastructureError, match="no step was saved in 3 starts"):
                next_attempt(run, NAME, RayLauncher().check, "lost", (), lambda _: 3, f"distlm-tiny-{number // 3}")
            make_attempt(run)
        else:
            assert next_attempt(run, NAME, RayLauncher().check, "lost", (), lambda _: 3, f"distlm-tiny-{number // 3}")


def test_attempts_in_one_start_are_not_counted(run: RunFolder) -> None:
    for number in range(5):
        begin_start(run, 0)
        assert following(run).number == number + 2


def test_a_step_that_was_saved_gives_all_starts_back(run: RunFolder) -> None:
    for number in range(1, 8):
        begin_start(run, number)
        save(run, number)
        assert following(run).number == number + 1


def test_an_attempt_that_was_not_written_whole_is_ended(sent: RunFolder, there: Path) -> None:
    """The storage was full."""
    RunFolder(there).new_attempt()
    run = run_of_files(there, carried_files(sent), NAME)
    assert [attempt.number for attempt in run.attempts()] == [1, 2]
    assert run.attempts()[0].result_json.exists() and following(run).number == 2
