"""Nodes on one machine, for tests and benchmarks that need a network between ranks. As root, on Linux.

    with Cluster(nodes=2, rate="1gbit") as cluster:
        first, second = cluster.nodes
        first.run(["python", "-m", "ddp", "train", "job.toml"], folder, {"MASTER_ADDR": first.address, ...})
        first.bytes_sent()

Each node has its own network, host name, IPC, mounts (a tmpfs on /dev/shm, one for TMPDIR) and process ids: what makes two nodes
two for every way ranks find each other's memory, /proc/PID/fd included; and its share of the cores, where there
is one for each. A head, which runs no ranks, holds the
switch they are plugged into and may start programs on them as ssh would (`Cluster.agent`). Files are shared,
as from a file server.

Everything hangs on one process, the head's first: the nodes live inside its process ids, it ends when its standard
input does, and the kernel then ends whatever runs there, the networks included. So nothing stays behind, also
when this process is killed, and nothing has a name that a second cluster could meet.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from launch.submit import descendants

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "taskset": "util-linux", "ip": "iproute2", "tc": "iproute2"}
SETUP_SECONDS = 20.0
AGENT = "/dev/shm/agent"
_NETWORK = "10.77.0"  # seen inside only
_HEAD_ADDRESS = f"{_NETWORK}.254"
_TEMPORARY = "/var/tmp"  # Open MPI's daemons name files there by their process ids, which nodes have alike
_LOGIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# A node's first process: orphans are reaped as they end, and the end of the standard input is the end of the node.
_FIRST_PROCESS = (
    "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"
)


class ClusterError(RuntimeError):
    """The machine refused a part of the cluster; says which command, and what it said."""


@dataclass(frozen=True, slots=True)
class Link:
    """What joins a node to the switch, the same in both directions; `rate` as tc writes it."""

    rate: str = "1gbit"
    burst: str = "256kb"
    queue: str = "20ms"

    def limit(self, device: str) -> str:
        return f"tc qdisc replace dev {device} root tbf rate {self.rate} burst {self.burst} latency {self.queue}"


class Place:
    """One set of namespaces and the process that holds it; commands run inside.

    Attributes:
        name, address: host name and IPv4 address.
        pid: of the first process, as this process sees it.
        cores: that its commands may run on; empty for all.
    """

    def __init__(self, name: str, address: str, inside: Place | None = None, cores: Sequence[int] = ()) -> None:
        self.name, self.address, self.cores = name, address, tuple(cores)
        entered = inside._enter() if inside is not None else []
        unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*entered, *unshare, sys.executable, "-I", "-S", "-c", _FIRST_PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert self._holder.stdout is not None and self._holder.stderr is not None
            if self._holder.stdout.readline() != "ready\n":
                raise ClusterError(f"{name} cannot have namespaces of its own: {self._holder.stderr.read().strip()}")
            self.pid = _last_below(self._holder.pid)
        except BaseException:
            self.close()
            raise

    def argv(self, command: Sequence[str], folder: Path | None = None) -> list[str]:
        """The argv that runs `command` in there, in `folder`."""
        change = ["env", f"--chdir={folder.resolve()}"] if folder is not None else []
        return [*self._enter(), *self.on_cores(), *change, *command]

    def on_cores(self) -> list[str]:
        """The start of an argv that keeps to the cores of this place."""
        return ["taskset", "--cpu-list", ",".join(map(str, self.cores))] if self.cores else []

    def popen(
        self, command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `command` with `environment` on top of this process's and the place's TMPDIR; its outputs are pipes.

        What is still running when the cluster ends is killed.
        """
        return subprocess.Popen(
            self.argv(command, folder),
            env={**os.environ, "TMPDIR": _TEMPORARY, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        command: Sequence[str],
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """`command` to its end.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds; it is killed with all below it.
        """
        with self.popen(command, folder, environment) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except BaseException:
                for each in (*descendants(process.pid), process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def set_up(self, script: str) -> None:
        """Run a shell script in there that has to succeed."""
        ended = self.run(["sh", "-euc", script], timeout=SETUP_SECONDS)
        if ended.returncode:
            raise ClusterError(f"{self.name} cannot be set up: {ended.stderr.strip()}")

    def pid_seen_by(self, other: Place) -> int:
        """The first process's id among the ids of `other`, which this place is inside of."""
        own, others = (_nested_pids(place.pid) for place in (self, other))
        return own[len(others) - 1]

    def close(self) -> None:
        """End all processes inside; safe to call twice."""
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()
        try:
            self._holder.wait(5.0)
        except subprocess.TimeoutExpired:
            self._holder.kill()  # and by --kill-child what it holds
            self._holder.wait(5.0)

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--"]


class Node(Place):
    """A place with one link, eth0, to the switch."""

    def __init__(self, index: int, head: Place, link: Link, shared_memory: str, cores: Sequence[int]) -> None:
        super().__init__(f"node{index}", f"{_NETWORK}.{index + 1}", inside=head, cores=cores)
        self._head, self._port = head, f"port{index}"
        try:
            self._plug_in(link, shared_memory)
        except BaseException:
            self.close()
            raise

    def bytes_sent(self) -> int:
        """Bytes that have left through the link since it was made, headers included."""
        return self._counters()[8]

    def bytes_received(self) -> int:
        return self._counters()[0]

    def unplug(self) -> None:
        """Nothing comes through the link any more, and nobody is told."""
        self._head.set_up(f"ip link set {self._port} down")

    def plug_in_again(self) -> None:
        self._head.set_up(f"ip link set {self._port} up")

    def _plug_in(self, link: Link, shared_memory: str) -> None:
        self.set_up(_own_host(self.name, shared_memory))
        there = self.pid_seen_by(self._head)
        self._head.set_up(
            f"ip link add {self._port} type veth peer name eth0 netns {there}\n"
            f"ip link set {self._port} master switch up\n{link.limit(self._port)}\n"
        )
        self.set_up(f"ip addr add {self.address}/24 dev eth0\nip link set eth0 up\n{link.limit('eth0')}\n")

    def _counters(self) -> list[int]:
        """Columns of /proc/net/dev: received bytes first, sent bytes ninth."""
        lines = Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        (line,) = [line for line in lines if line.strip().startswith("eth0:")]
        return [int(number) for number in line.partition(":")[2].split()]


class Cluster:
    """`nodes` nodes behind one switch, each link at `rate`; use as a context manager.

    Args:
        rate: of each link and direction, as tc writes it ("1gbit", "200mbit").
        shared_memory: size of each node's /dev/shm, as mount writes it.

    Attributes:
        head: where mpirun runs; holds the switch and no ranks.
        agent: a program on the head, called like ssh: `agent HOST COMMAND...`, with a login's bare environment.

    Raises:
        ClusterError: a namespace or a device was refused; `refusal()` tells beforehand.
    """

    head: Place
    nodes: list[Node]
    agent = AGENT

    def __init__(self, nodes: int = 2, rate: str = "1gbit", shared_memory: str = "256m") -> None:
        self._count, self._link, self._shared_memory = nodes, Link(rate), shared_memory

    def __enter__(self) -> Self:
        self.nodes = []
        self.head = Place("head", _HEAD_ADDRESS)
        try:
            self.head.set_up(_own_host("head", "4m") + _hosts_file(self._count) + _SWITCH)
            for index, cores in enumerate(_shares(sorted(os.sched_getaffinity(0)), self._count)):
                self.nodes.append(Node(index, self.head, self._link, self._shared_memory, cores))
            for place in (self.head, *self.nodes):  # Open MPI's daemon on a node insists on finding it, too
                place.set_up(_agent_file(self.head, self.nodes))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def mpirun_options(self, mpi: Literal["openmpi", "mpich"], ranks_per_node: int) -> list[str]:
        """What an mpirun on the head needs to start so many ranks on each node, one node after the other."""
        hosts = ",".join(f"{node.name}:{ranks_per_node}" for node in self.nodes)
        if mpi == "mpich":
            return ["-launcher", "ssh", "-launcher-exec", self.agent, "-hosts", hosts]
        return ["--prtemca", "plm_ssh_agent", self.agent, "--host", hosts]

    def close(self) -> None:
        """End all that runs on the nodes, and the nodes."""
        self.head.close()
        for node in self.nodes:
            node.close()


def refusal() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "nodes on one machine need root"
    if missing := sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None}):
        return f"nodes on one machine need Debian's {' and '.join(missing)}"
    try:
        with Cluster(nodes=1):
            return None
    except ClusterError as error:
        return str(error)


def _shares(cores: Sequence[int], nodes: int) -> list[Sequence[int]]:
    """Each node's cores; nothing where there are more nodes than cores."""
    return [cores[index::nodes] if len(cores) >= nodes else () for index in range(nodes)]


def _own_host(name: str, shared_memory: str) -> str:
    """IPv6 is off where it can be: its own messages would be counted as bytes on the link."""
    return (
        f"hostname {name}\nmount -t tmpfs -o size={shared_memory},mode=1777 tmpfs /dev/shm\n"
        f"mount -t tmpfs -o size=64m,mode=1777 tmpfs {_TEMPORARY}\n"
        "mount -t sysfs sysfs /sys\n"
        "echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/default/disable_ipv6 || true\nip link set lo up\n"
    )


def _hosts_file(nodes: int) -> str:
    """Every name at its address, as on a cluster; the nodes inherit the mount."""
    lines = ["127.0.0.1 localhost", f"{_HEAD_ADDRESS} head"]
    lines += [f"{_NETWORK}.{index + 1} node{index}" for index in range(nodes)]
    text = shlex.quote("\n".join(lines))
    return f"printf '%s\\n' {text} >/dev/shm/hosts\nmount --bind /dev/shm/hosts /etc/hosts\n"


_SWITCH = f"ip link add switch type bridge\nip addr add {_HEAD_ADDRESS}/24 dev switch\nip link set switch up\n"


def _agent_file(head: Place, nodes: Sequence[Place]) -> str:
    cases = " ".join(
        f"{node.name}) pid={node.pid_seen_by(head)} cores='{' '.join(node.on_cores())}';;" for node in nodes
    )
    text = (
        "#!/bin/sh\n# [OPTIONS] HOST COMMAND...: what ssh does.\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
        f'case $host in {cases} *) echo "there is no node $host" >&2; exit 255;; esac\n'
        f"exec nsenter --target $pid {' '.join(NAMESPACES)} -- "
        f'$cores env -i HOME="$HOME" PATH={_LOGIN_PATH} TMPDIR={_TEMPORARY} sh -c "$*"\n'
    )
    return f"printf '%s' {shlex.quote(text)} >{AGENT}\nchmod 755 {AGENT}\n"


def _last_below(pid: int) -> int:
    """The process at the end of a chain of only children: nsenter's, unshare's, the first process itself."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        (pid,) = (int(child) for child in children)
    return pid


def _nested_pids(pid: int) -> list[int]:
    """A process's id in each PID namespace that it is in, outermost first."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("NSpid:")]
    return [int(number) for number in line.split()[1:]]
