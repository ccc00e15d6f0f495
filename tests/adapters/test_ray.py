"""Recording in a pool of a real Ray: the same table as without, whoever is killed. Opt-in, by `make ray`: skipped without Ray."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy_decoder
from processes import environment
from recordings import MANY, STOP, merged, record, shards

from riskcal import RiskcalError

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'riskcal-ltt[ray]'")
pool_of = pytest.importorskip("ray.util.multiprocessing").Pool
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Ray leaves sockets and files to its processes, and warns of what it will change.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TWELVE = {"prompts": MANY[:12], "shard_prompts": 2}


SLOW = functools.partial(toy_decoder.load, None, 0.2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One on this machine, whose workers import what the tests do."""
    # a node that is only slow, on a busy machine, is not to be given up; one that is gone is noticed in 20 s
    patient = {
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 20,
        "agent_register_timeout_ms": 120_000,
    }
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": patient}
    found = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    imports = {"env_vars": {"PYTHONPATH": environment()["PYTHONPATH"]}}
    ray.init(address=found.address, log_to_driver=False, runtime_env=imports)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return merged(record(tmp_path_factory.mktemp("whole") / "out", **TWELVE))


@pytest.fixture
def killing(tmp_path):
    """A decoder whose process is killed once."""
    flag = tmp_path / "flag"
    flag.touch()
    return functools.partial(toy_decoder.load_killed, str(flag))


def test_a_pool_of_ray_gives_the_table_of_one_process(tmp_path, whole):
    with pool_of(2) as pool:
        assert merged(record(tmp_path / "out", pool=pool, **TWELVE)) == whole


def test_a_relative_folder_is_the_callers(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    with pool_of(1) as pool:
        assert merged(record(Path("out"), pool=pool, **TWELVE)) == whole


def test_what_a_decoder_raises_is_passed_on(tmp_path):
    load = functools.partial(toy_decoder.load_nothing)
    with pool_of(1) as pool, pytest.raises(RiskcalError, match="load: returned a object without"):
        record(tmp_path / "out", load=load, pool=pool, **TWELVE)


def test_a_recording_that_stops_does_so_at_the_same_threshold(tmp_path):
    settings = {"prompts": MANY, "shard_prompts": 8, "thresholds": [0.9, 0.6, 0.3], "stop": STOP}
    with pool_of(2) as pool:
        found = record(tmp_path / "out", pool=pool, **settings)
    assert merged(found) == merged(record(tmp_path / "alone", **settings))


def test_a_killed_worker_is_said_and_the_same_call_ends_in_the_same_table(tmp_path, whole, killing):
    out = tmp_path / "out"
    with pool_of(2) as pool, pytest.raises(RiskcalError, match=r"pool: .*make the same call again"):
        record(out, load=killing, pool=pool, **TWELVE)
    assert len(shards(out)) < 6
    with pool_of(2) as pool:
        record(out, load=killing, pool=pool, **TWELVE)
    assert merged(out) == whole


def test_a_killed_worker_that_ray_may_restart_is_not_noticed(tmp_path, whole, killing):
    again = {"max_restarts": 2, "max_task_retries": 2}
    with pool_of(2, ray_remote_args=again) as pool:
        record(tmp_path / "out", load=killing, pool=pool, **TWELVE)
    assert merged(tmp_path / "out") == whole


DRIVER = """
import functools, os, sys
import ray, toy_decoder
from ray.util.multiprocessing import Pool
from recordings import MANY, record

imports = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env=imports)
load = functools.partial(toy_decoder.load, None, .2)
record(sys.argv[2], MANY[:12], load, shard_prompts=2, pool=Pool(2))
"""


def test_a_killed_driver_leaves_whole_shards_and_the_same_call_ends_in_the_same_table(
    tmp_path, whole, cluster
):
    out = tmp_path / "out"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, str(out)], env=environment()
    )
    while driver.poll() is None and not shards(out):
        time.sleep(0.02)
    assert driver.poll() is None, "the driver ended before it could be killed"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    with pool_of(2) as pool:
        record(out, load=SLOW, pool=pool, **TWELVE)
    assert merged(out) == whole


def test_a_lost_node_is_said_and_the_same_call_ends_in_the_same_table(tmp_path, whole, cluster):
    out, node = tmp_path / "out", cluster.add_node(num_cpus=1, include_dashboard=False)

    def lose():
        while not shards(out):
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    losing = threading.Thread(target=lose)
    with pool_of(3) as pool:
        losing.start()
        with pytest.raises(RiskcalError, match=r"pool: .*make the same call again"):
            record(out, load=SLOW, pool=pool, **TWELVE)
        losing.join()
    while sum(one["Alive"] for one in ray.nodes()) > 1:  # until then Ray would start workers there
        time.sleep(0.2)
    with pool_of(2) as pool:
        record(out, load=SLOW, pool=pool, **TWELVE)
    assert merged(out) == whole
