"""What a node tells about itself before it gets workers, and what is made of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from distlm.controller.capacity import Node
from distlm.controller.fitness import NodeAnswer, NodeFitness, NodeProbe, code_versions, differing_versions

NODE = Node("id-of-node7", "node7", 4.0, 0.0)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_probe_writes_and_listens_where_it_is_told(tmp_path: Path) -> None:
    probe = NodeProbe()
    answer = probe.look(str(tmp_path / "probe"), "lo")
    assert (tmp_path / "probe").read_text() == "distlm"
    assert (answer.storage_failure, answer.interface_failure) == ("", "")
    assert answer.address is not None and answer.address[0] == "127.0.0.1"
    deaf = ("127.0.0.1", closed_port())
    assert NodeProbe().unreachable([answer.address, deaf, answer.address]) == [1]


def test_a_probe_tells_what_fails(tmp_path: Path) -> None:
    answer = NodeProbe().look(str(tmp_path / "nowhere" / "probe"), "ib7")
    assert answer.storage_failure == "No such file or directory"
    assert answer.address is None
    assert "has no network interface ib7" in answer.interface_failure and "lo" in answer.interface_failure


def test_versions_are_those_of_the_code_itself() -> None:
    versions = code_versions()
    assert {"python", "distlm", "torch", "ray", "deepspeed"} <= versions.keys()
    assert differing_versions(versions, versions) == ""
    other = {**versions, "torch": "1.0", "distlm": "0.0 (abc)"}
    del other["ray"]
    differing = differing_versions(versions, other)
    assert f"torch 1.0 and this node {versions['torch']}" in differing
    assert f"ray not at all and this node {versions['ray']}" in differing
    assert "distlm 0.0 (abc)" in differing and "deepspeed" not in differing


def problem_of(fitness: NodeFitness, answer: NodeAnswer) -> str:
    return fitness._problem(NODE, answer)


@pytest.fixture
def fitness(tmp_path: Path) -> NodeFitness:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    return NodeFitness(tmp_path / "runs" / "run")


def answer(
    storage_failure: str = "", versions: dict[str, str] | None = None, interface_failure: str = ""
) -> NodeAnswer:
    return NodeAnswer(storage_failure, versions or code_versions(), ("10.0.0.7", 4000), interface_failure)


def test_what_is_wrong_with_a_node_is_said_with_its_name(fitness: NodeFitness, tmp_path: Path) -> None:
    shared = f"every node must share {tmp_path / 'runs'}, but node7"
    assert problem_of(fitness, answer("Permission denied")) == f"{shared} cannot write there (Permission denied)"
    assert problem_of(fitness, answer()) == f"{shared} writes to another folder of that name; it is not shared"

    def with_file(given: NodeAnswer) -> str:
        fitness._file(NODE).write_text("distlm")
        return problem_of(fitness, given)

    assert with_file(answer()) == ""
    assert not list((tmp_path / "runs" / "run").iterdir())
    wrong = with_file(answer(versions={**code_versions(), "deepspeed": "0.1"}))
    assert wrong.startswith("every node must have the same packages, but node7 has deepspeed 0.1 and this node ")
    missing = with_file(answer(interface_failure="has no network interface ib0 with an address; it has lo"))
    assert missing == "node7 has no network interface ib0 with an address; it has lo (resources.network_interface)"


def test_what_was_written_late_is_removed(fitness: NodeFitness, tmp_path: Path) -> None:
    fitness._file(NODE).write_text("distlm")
    fitness.close()
    assert not list((tmp_path / "runs" / "run").iterdir())
