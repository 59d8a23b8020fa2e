"""A node that is lost without a reset of any connection, as by a power cut, on hosts with networks of their own."""

from __future__ import annotations

import os
import shutil
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
from elastic_runs import SETTINGS, losses, make_place, require_each_step_once, wait_for_steps
from hosts import hosts
from ray_cluster import RayCluster

from distlm.errors import ExitCode
from distlm.processes import no_descendants_left
from distlm.run_folder import read_json
from distlm.temporary import temporary_root

LOSS_IS_KNOWN_IN_S = 45.0
"""Ray's head takes 62 s."""


@pytest.mark.cluster
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("ip"), reason="needs root, and ip of iproute2")
def test_the_others_go_on(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    steps = "training.max_steps=3000"
    with temporary_root() as folder, hosts(3, folder) as (head, *others), no_descendants_left():
        cluster = RayCluster(folder, num_cpus=1, host=head)
        for host in others:
            cluster.add_node(1, host=host)
        place.environ |= cluster.environ_of_driver
        place.where = head.command
        command = place.start("submit", "run.yaml", *SETTINGS, steps, "resources.num_workers=[2,3]")
        wait_for_steps(command, 3, 30)
        cut_s = time.time()
        others[0].cut_off()
        wait_for_steps(command, 2, 10)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == ExitCode.PREEMPTED, (command.out, command.err)
    (retry,) = read_json(command.run.attempts()[-1].result_json)["retries"]
    assert (retry["cause"], retry["host"]) == ("node lost", "host1"), retry
    assert datetime.fromisoformat(retry["failed_at"]).timestamp() - cut_s < LOSS_IS_KNOWN_IN_S
    found = require_each_step_once(place, command.run)

    for name in cluster.environ_of_driver:
        del place.environ[name]
    place.where = ()
    straight = place.start("submit", "run.yaml", *SETTINGS, f"training.max_steps={max(found)}", "tracking.report_to=[]")
    assert straight.wait() == ExitCode.SUCCEEDED, straight.err
    assert found == pytest.approx(losses(straight.run), rel=5e-5)
