"""torch.distributed's default process group: the control plane of every run, whatever started the ranks.

Under torchrun and srun the ranks find each other by MASTER_ADDR and MASTER_PORT; under mpirun rank 0 opens a
TCPStore and tells the others its address over MPI. One process gets a group of one, so that the trainer has
a single path. The environment is read (ddp.topology) before mpi4py is imported, which changes it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ddp.errors import PeerLostError, TransportError, UsageError
from ddp.topology import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface
_ADDRESS_BYTES = 256
SECONDS_TO_BE_READ = 0.3  # by mpirun, which passes on what a rank wrote
# What gloo and the store say when a rank at the other end is gone; they have no type of their own for it.
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Connection was likely closed",
    "failed to recv",
    "Wait timeout",
)


def initialise(topology: Topology, device_type: str, timeout_seconds: float) -> dist.Store:
    """Set up the default process group over all ranks: gloo, and nccl besides where `device_type` is cuda.

    Returns:
        The store that the ranks met at, with room for other keys; of this attempt alone.

    Raises:
        UsageError: the launcher needs something that is not there (mpi4py, MASTER_ADDR); says what to do.
        PeerLostError: another rank did not come within `timeout_seconds`.
        TransportError: the group cannot be set up for another reason.
    """
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    store: dist.Store | None = None
    try:
        # An agent's store outlives its ranks, and holds what an earlier attempt's said.
        store = dist.PrefixStore(f"attempt-{topology.restarts}", _store(topology, timeout))
        store.set(f"here/{topology.rank}", "")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default", store),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:  # what c10d raises, its own types included
        kind = PeerLostError if isinstance(error, dist.DistStoreError) or is_peer_gone(error) else TransportError
        raise kind(
            f"the process group of {topology.world_size} ranks cannot be set up{_who_did_not_come(store, topology)}: {error}"
        ) from error
    return store


def _who_did_not_come(store: dist.Store | None, topology: Topology) -> str:
    absent: list[str] = []
    with suppress(RuntimeError):  # the store is gone
        if store is not None:
            absent = [str(rank) for rank in range(topology.world_size) if not store.check([f"here/{rank}"])]
    return f": rank {', '.join(absent)} did not come" if absent else ""


def shutdown() -> None:
    """Wait for all ranks, then take the group down. For the way out that every rank takes; not after an error.

    Open MPI ends all other ranks at the first exit code that is not zero, so they have to meet before.
    """
    if dist.is_initialized():
        # Not a collective over a Python tensor: gloo's thread may still let go of that while the interpreter
        # ends, which aborts the process ("terminate called without an active exception", torch 2.13).
        dist.barrier()
        dist.destroy_process_group()


def meet(seconds: float) -> bool:
    """Whether all ranks of MPI came here within `seconds`; false where MPI is not in use."""
    if (mpi := _running_mpi()) is None:
        return False
    request = mpi.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def abort(code: int) -> None:
    """End all ranks of MPI at once with `code`; returns where MPI is not in use.

    A rank that merely exits after an error leaves the others of Open MPI waiting for ever. What was written is given
    time to be read first: MPICH's mpirun lets go of the rest.
    """
    if (mpi := _running_mpi()) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(SECONDS_TO_BE_READ)
        mpi.COMM_WORLD.Abort(code)


def is_peer_gone(error: BaseException) -> bool:
    """Whether c10d raised `error` because the rank at the other end is gone: a consequence, not a cause."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_GONE)


def routed_address(addresses: Iterable[str], own: Iterable[str]) -> str | None:
    """The own address from which most of `addresses` are reached; None where there is no route to any.

    An address that several nodes have, such as a container bridge's, leads nowhere and does not count.
    """
    foreign = [address for address in addresses if address not in set(own)]
    sources = [source for address in foreign if (source := _source_address(address))]
    useful = Counter(source for source in sources if not source.startswith("127."))
    return useful.most_common(1)[0][0] if useful else None


def interface_towards(host: str) -> str | None:
    """The network interface of this node's route to `host` (IPv4); None where it cannot be told."""
    source = _source_address(host)
    return next((name for name, address in _interfaces().items() if address == source), None)


def _store(topology: Topology, timeout: timedelta) -> dist.Store:
    """The store to start from: in this process, on rank 0, or of the agent of torchrun that did not leave it to rank 0."""
    if topology.world_size == 1:
        _use_interface_towards(LOOPBACK)
        return dist.HashStore()
    if topology.under_mpi:
        return _mpi_store(topology, timeout)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UsageError(
            f"{' and '.join(missing)} not set: export the first node's host name as MASTER_ADDR and a free port "
            f"as MASTER_PORT before srun, so that {topology.world_size} ranks can find each other"
        )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UsageError(f"MASTER_PORT={port} is not a port, 1 to 65535: the launcher should set it")
    _use_interface_towards(LOOPBACK if topology.one_node else host)
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        host,
        int(port),
        is_master=topology.rank == 0 and not is_agents,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _mpi_store(topology: Topology, timeout: timedelta) -> dist.Store:
    """A store on rank 0, listening on the one address that it broadcasts over MPI."""
    comm = _import_mpi().COMM_WORLD
    if comm.Get_size() != topology.world_size:
        raise UsageError(
            f"mpirun started {topology.world_size} ranks, but mpi4py sees {comm.Get_size()}: it uses another MPI "
            "than this mpirun. Use the mpirun beside this Python, or rebuild mpi4py with the MPI of that mpirun"
        )
    host = LOOPBACK if topology.one_node else _address_for_others(comm)
    store, port = None, 0
    if comm.Get_rank() == 0:
        listener = socket.create_server((host, 0), backlog=topology.world_size)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    host, _, port_text = _broadcast(comm, f"{host} {port}").partition(" ")
    _use_interface_towards(host)
    return store or dist.TCPStore(host, int(port_text), is_master=False, timeout=timeout)


def _address_for_others(comm: MPI.Comm) -> str:
    """Rank 0's address for the other nodes. A host name will not do: Debian's resolves to loopback."""
    own = [address for address in _interfaces().values() if not address.startswith("127.")]
    everyone = bytearray(_ADDRESS_BYTES * comm.Get_size())
    comm.Allgather(_padded(" ".join(own)), everyone)
    address = routed_address(everyone.replace(b"\0", b" ").decode().split(), own)
    if address is None and comm.Get_rank() == 0:
        raise UsageError("rank 0 has no route to another node: check the network between the nodes")
    return address or ""


def _broadcast(comm: MPI.Comm, text: str) -> str:
    """Rank 0's text on all ranks, as bytes: mpi4py's own way for objects is pickle."""
    buffer = _padded(text)
    comm.Bcast(buffer)
    return buffer.rstrip(b"\0").decode()


def _padded(text: str) -> bytearray:
    return bytearray(text.encode()[:_ADDRESS_BYTES].ljust(_ADDRESS_BYTES, b"\0"))


def _use_interface_towards(host: str) -> None:
    """Tell gloo which interface to use, unless the user did; left alone it takes what the host name resolves to."""
    name = interface_towards(host)
    is_detour = name == interface_towards(LOOPBACK) and host != LOOPBACK  # the host's own name on its own node
    if "GLOO_SOCKET_IFNAME" not in os.environ and name and not is_detour:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _source_address(host: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # UDP: asks for the route and sends nothing
        except OSError:
            return None
        return probe.getsockname()[0]


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _import_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: its shared library of MPI is missing
        raise UsageError(
            f"mpirun started this process, but mpi4py cannot be imported ({error}): "
            "pip install -e '.[mpi]', or start the job with torchrun"
        ) from None
    return MPI


def _running_mpi() -> Any | None:
    """MPI where this process has joined it and not left it yet; never imports it."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None
