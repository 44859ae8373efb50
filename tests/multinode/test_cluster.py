"""The nodes are nodes: strangers to each other but for the link and the files, and gone when they are done with."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import Cluster, Node
from jobs import is_running, python, wait_until

MEBIBYTE = 1 << 20

RECEIVE = """
import socket, sys
listener = socket.create_server(("", 5000))
print("listening", flush=True)
connection, _ = listener.accept()
count = 0
while data := connection.recv(1 << 20): count += len(data)
print(count)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=20) as connection:
    for _ in range(int(sys.argv[2])): connection.sendall(bytes(1 << 20))
"""


def output(node: Node, *command: str) -> str:
    ended = node.run(command, timeout=20)
    assert ended.returncode == 0, ended
    return ended.stdout


def test_each_node_has_its_own_name_memory_and_processes(two_nodes: Cluster) -> None:
    first, second = two_nodes.nodes
    assert [output(node, "hostname").strip() for node in two_nodes.nodes] == ["node0", "node1"]
    output(first, "sh", "-c", "echo mine >/dev/shm/file")
    assert output(first, "ls", "/dev/shm").split() == ["agent", "file"]
    assert output(second, "ls", "/dev/shm").split() == ["agent"]
    assert not Path("/dev/shm/file").exists()
    for node in two_nodes.nodes:
        seen = [int(name) for name in output(node, "ls", "/proc").split() if name.isdecimal()]
        assert 1 in seen
        assert len(seen) < 5, "only the node's own processes are to be seen"
        assert output(node, "ls", "/sys/class/net").split() == ["eth0", "lo"]
    for kind in ("net", "uts", "ipc", "mnt", "pid"):
        here = os.readlink(f"/proc/self/ns/{kind}")
        there = {os.readlink(f"/proc/{place.pid}/ns/{kind}") for place in (two_nodes.head, first, second)}
        assert len({here, *there}) == 4, kind


def test_nodes_share_out_the_cores(two_nodes: Cluster) -> None:
    here = os.sched_getaffinity(0)
    seen = [
        output(node, *python("-c", "import os; print(*os.sched_getaffinity(0))")).split() for node in two_nodes.nodes
    ]
    if len(here) >= 2:
        assert sorted(int(core) for cores in seen for core in cores) == sorted(here)
    by_agent = two_nodes.head.run(
        [two_nodes.agent, "node1", *map(shlex.quote, python("-c", "import os; print(*os.sched_getaffinity(0))"))]
    )
    assert by_agent.stdout.split() == seen[1]


def test_shared_memory_has_the_size_that_was_asked(may_have_nodes: None) -> None:
    with Cluster(nodes=1, shared_memory="1m") as cluster:
        ended = cluster.nodes[0].run(["dd", "if=/dev/zero", "of=/dev/shm/file", "bs=64k", "count=64"])
    assert ended.returncode != 0
    assert "No space left on device" in ended.stderr


def test_bytes_on_the_link_are_counted_and_the_nodes_know_each_others_names(two_nodes: Cluster) -> None:
    first, second = two_nodes.nodes
    sent, received = first.bytes_sent(), second.bytes_received()
    with second.popen(python("-c", RECEIVE)) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        output(first, *python("-c", SEND, "node1", "8"))
        assert receiver.communicate(timeout=20)[0] == f"{8 * MEBIBYTE}\n"
    assert first.bytes_sent() - sent == pytest.approx(8 * MEBIBYTE, rel=0.06)
    assert second.bytes_received() - received == pytest.approx(8 * MEBIBYTE, rel=0.06)


def test_the_agent_runs_a_command_on_the_named_node_with_a_bare_environment(two_nodes: Cluster) -> None:
    ended = two_nodes.head.run(
        [two_nodes.agent, "-x", "node1", "hostname;", "echo", '"a  b"', "$PATH$SECRET"], None, {"SECRET": "s"}
    )
    assert ended.stdout.splitlines()[0] == "node1"
    assert ended.stdout.splitlines()[1].startswith("a  b /")
    assert not ended.stdout.strip().endswith("s")
    unknown = two_nodes.head.run([two_nodes.agent, "node7", "true"])
    assert (unknown.returncode, unknown.stderr) == (255, "there is no node node7\n")


def test_an_unplugged_node_is_silent_and_comes_back(may_have_nodes: None) -> None:
    probe = python("-c", "import socket; socket.create_connection(('node1', 5000), timeout=1)")
    with Cluster(nodes=2) as cluster:
        first, second = cluster.nodes
        with second.popen(python("-c", RECEIVE)) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "listening\n"
            second.unplug()
            assert "TimeoutError" in first.run(probe).stderr
            second.plug_in_again()
            wait_until(lambda: first.run(probe).returncode == 0, 20)
            receiver.communicate(timeout=20)


def test_what_takes_too_long_is_killed_with_all_below_it(two_nodes: Cluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        two_nodes.nodes[0].run(["sh", "-c", "sleep 120 & wait"], timeout=0.5)
    assert "sleep" not in output(two_nodes.nodes[0], "sh", "-c", "cat /proc/[0-9]*/comm")


def test_an_error_inside_takes_the_nodes_down(may_have_nodes: None) -> None:
    with pytest.raises(ZeroDivisionError), Cluster(nodes=2) as cluster:
        left = cluster.nodes[1].popen(["sleep", "120"])
        pids = [place.pid for place in (cluster.head, *cluster.nodes)]
        _ = 1 / 0
    left.communicate(timeout=5)
    assert not any(is_running(pid) for pid in pids)


KILLED = """
import os, time
from cluster import Cluster
cluster = Cluster(nodes=2).__enter__()
sleeper = cluster.nodes[0].popen(["sleep", "120"])
print(*(place.pid for place in (cluster.head, *cluster.nodes)), sleeper.pid, flush=True)
time.sleep(120)
"""


def test_a_killed_owner_leaves_nothing(may_have_nodes: None) -> None:
    owner = subprocess.Popen(
        python("-c", KILLED),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert all(is_running(pid) for pid in pids)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate(timeout=10)
    wait_until(lambda: not any(is_running(pid) for pid in pids), 10)
