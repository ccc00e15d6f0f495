"""Recording in a pool of a real Ray, and engines in its actors: the same table and answers as without, whoever is killed.

Opt-in, by `make ray`: skipped without Ray.
"""

import functools
import os
import re
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

import riskcal_adapters
from riskcal import ExitPolicy, RiskcalError
from riskcal.serving import EventLog, KillSwitch, Shadow, read_events

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


# -- engines in actors, as docs/cluster.md has them --------------------------------------------------------------------

WORDS = [
    "phoneme",
    "layer",
    "exit",
    "calm",
    "token",
    "risk",
    "bound",
    "prompt",
    "early",
    "model",
] * 4
POLICY = ExitPolicy(threshold=0.9)


@pytest.fixture(scope="module")
def adapters():
    return pytest.importorskip("riskcal_adapters.torch")


@pytest.fixture(scope="module")
def page(adapters):
    """What the page defines, for machines without a GPU."""
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class" in block
    ]
    names = {"__name__": "__main__"}  # as in a script: Ray sends the class to its workers
    exec(code.replace("num_gpus=1", "num_cpus=0.5"), names)
    return names


@pytest.fixture(scope="module")
def load(adapters):
    return functools.partial(adapters.load_example, "g2p")


@pytest.fixture(scope="module")
def alone(adapters, load):
    """Texts and exits of an engine in this process."""
    with adapters.Engine(load(), POLICY, slots=8) as engine:
        return sorted(told(done) for done in engine.run(requests_of(WORDS, adapters)))


def told(done):
    return done.id, done.text, done.exit_layers.tolist(), done.error


def test_engines_in_actors_answer_as_one_engine_does_and_share_a_log_and_a_switch(
    tmp_path, page, load, alone, adapters
):
    log, switch = EventLog(tmp_path / "events.jsonl"), KillSwitch(path=tmp_path / "off")
    watched = {"kill_switch": switch, "shadow": Shadow(rate=0.3), "events": log}
    found = page["serve"](requests_of(WORDS, adapters), load, POLICY, 2, slots=8, **watched)
    assert sorted(map(told, found)) == alone
    events = read_events(log.path).events
    shadowed = [one for one in events if one["name"] == "riskcal.shadow.evaluated"]
    assert len(shadowed) == sum(watched["shadow"].takes(one[0]) for one in alone) > 0
    served = [one for one in events if one["name"] == "riskcal.request.served"]
    assert {e["attributes"]["gen_ai.response.id"] for e in served} == {one[0] for one in alone}

    (tmp_path / "off").write_text("drill\n")
    deep = page["serve"](requests_of(WORDS[:4], adapters), load, POLICY, 2, slots=8, **watched)
    assert all(set(done.exit_layers.tolist()) == {8} for done in deep)


def process_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def node_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


def requests_of(words, adapters):
    return [adapters.Request(word, id=f"r{i}") for i, word in enumerate(words)]


def asked(actors, adapters):
    requests = requests_of(WORDS, adapters)
    return [actors[i % len(actors)].answer.remote(one) for i, one in enumerate(requests)]


def test_an_engine_that_is_killed_is_started_again_and_no_request_is_lost(
    page, load, alone, adapters
):
    actors = [page["Served"].remote(load, POLICY, slots=1) for _ in range(2)]
    before = process_of(actors[0])
    answers = asked(actors, adapters)
    ray.wait(answers, num_returns=3)
    os.kill(before, signal.SIGKILL)
    assert sorted(told(done) for done in ray.get(answers)) == alone
    assert process_of(actors[0]) != before


def test_without_restarts_the_caller_is_told(page, load, adapters):
    actor = page["Served"].options(max_restarts=0, max_task_retries=0).remote(load, POLICY, slots=1)
    process = process_of(actor)
    answers = asked([actor], adapters)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(answers)


SAME = {"batch_size": 3, "progress": False}


def test_a_pool_of_ray_records_by_engines_as_one_process_does(tmp_path, load):
    def recorded(out, **settings):
        riskcal_adapters.record(
            WORDS[:10], load, [0.9, 0.5], out, shard_prompts=3, engine=True, **SAME | settings
        )
        return merged(out)

    with pool_of(2) as pool:
        assert recorded(tmp_path / "out", pool=pool) == recorded(tmp_path / "alone")


def test_engines_of_a_lost_node_go_on_elsewhere(page, load, alone, adapters, cluster):
    strategy = pytest.importorskip("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    node = cluster.add_node(num_cpus=1, include_dashboard=False)
    there = page["Served"].options(scheduling_strategy=strategy(node.node_id, soft=True))
    actors = [page["Served"].remote(load, POLICY, slots=1)]
    while node_of(actors[-1]) != node.node_id:  # a node that has just come may not be taken at once
        actors = [actors[0], there.remote(load, POLICY, slots=1)]
    answers = asked(actors, adapters)
    ray.wait(answers, num_returns=3)
    cluster.remove_node(node, allow_graceful=False)
    assert sorted(told(done) for done in ray.get(answers)) == alone
