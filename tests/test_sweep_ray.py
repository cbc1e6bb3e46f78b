"""`ltnorm sweep --launcher ray`, on a real Ray of this machine."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from test_sweep import FOUR, SETTING, attempts, when_under_way

from ltnorm.reporting import schema


def test_a_killed_worker_costs_no_run(ltnorm, tmp_path, monkeypatch):
    """Two by two runs, one of whose workers is killed in the middle; each is made by Ray."""
    pytest.importorskip("ray")
    # Pages of the test run's own folder are no place for a worker to look for modules.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    killed = tmp_path / SETTING / "resnet8-bn-ce/seed0"
    killer = when_under_way(killed, lambda pid: os.kill(pid, signal.SIGKILL))
    before = signal.getsignal(signal.SIGTERM)
    answer = ltnorm(f"{FOUR} --set train.epochs=30 --launcher ray --jobs 2 --json")
    assert answer.code == 0, answer.err
    assert not killer.is_alive()
    lost = f"{SETTING}/resnet8-bn-ce/seed0: its process was lost; trying again, 1 of 2"
    assert lost in answer.err
    document = json.loads(answer.out)  # nothing else on stdout
    assert (document["finished"], document["failed"]) == (4, 0)
    assert {run["state"] for run in document["runs"]} == {"finished"}
    runs = [tmp_path / run["directory"] for run in document["runs"]]
    assert all(schema.finished(run) for run in runs)
    assert [attempts(run) for run in runs] == [2, 1, 1, 1]
    told = answer.err.splitlines()
    assert sum(line.startswith("finished ") for line in told) == 4
    assert len(told) == 6  # the precision, the lost one: Ray says nothing
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_ray_it_is_told_how_to_get_it(failing, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = failing(f"{FOUR} --launcher ray", code=2)
    assert "pip install 'ltnorm[ray]'" in told
    assert "--address is of a Ray cluster" in failing(f"{FOUR} --address auto", code=2)
    assert "did you mean 'ray'" in failing(f"{FOUR} --launcher rya", code=2)
