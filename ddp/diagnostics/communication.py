"""What an all-reduce would take with other numbers of ranks: an alpha-beta model, from one measurement and assumptions.

    inside a node    t = 2 (r - 1) alpha + 2 (r - 1) / r * bytes * beta      r ranks of the node
    between nodes    t = 2 (M - 1) alpha + 2 (M - 1) / M * bytes * beta      M nodes, on top of that inside

A ring's volume, which the direct exchange between nodes sends too (`benchmarks/scaling_model.py` measures and fits
that in more detail, to the machine it runs on). A run measures one size and one number of ranks, so of the two
coefficients only one can be told: alpha is assumed, beta is what the measured time leaves. With one rank nothing is
measured and all is assumed. Every assumption is a field of `Links`, and `Communication.basis` says which counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Links:
    """What is assumed where a run has not measured it.

    Attributes:
        ranks_per_node: ranks that share memory.
        node_latency_seconds: alpha inside a node, a message.
        node_bytes_per_second: 1/beta inside a node.
        link_latency_seconds: alpha between nodes.
        link_bytes_per_second: 1/beta between nodes, of one node's link.
    """

    ranks_per_node: int = 8
    node_latency_seconds: float = 2e-6
    node_bytes_per_second: float = 10e9
    link_latency_seconds: float = 20e-6
    link_bytes_per_second: float = 25e9 / 8


@dataclass(frozen=True, slots=True)
class Measured:
    """The all-reduce of a whole step as a run saw it, without waiting for ranks that came later."""

    gradient_bytes: int
    world_size: int
    nodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Communication:
    """The model with its coefficients; `basis` says in words what is measured and what is assumed."""

    gradient_bytes: int
    links: Links
    inside_measured: bool = False
    between_measured: bool = False

    def seconds(self, ranks: int) -> float:
        """One all-reduce among so many ranks, the nodes filled one after the other; 0 for one rank."""
        links, size = self.links, self.gradient_bytes
        nodes = -(-ranks // links.ranks_per_node)
        inside = _ring(min(ranks, links.ranks_per_node), size, links.node_latency_seconds, links.node_bytes_per_second)
        return inside + _ring(nodes, size, links.link_latency_seconds, links.link_bytes_per_second)

    @property
    def basis(self) -> str:
        """One line for the reader of a projection."""
        links = self.links
        inside = _rate_text(links.node_bytes_per_second, links.node_latency_seconds, self.inside_measured)
        between = _rate_text(links.link_bytes_per_second, links.link_latency_seconds, self.between_measured)
        return (
            f"an all-reduce averages {self.gradient_bytes / 1e6:.3g} MB; {links.ranks_per_node} ranks a node; inside a "
            f"node {inside}; between nodes {between}"
        )


def fit(measured: Measured, assumed: Links) -> Communication:
    """The assumptions with what `measured` knows better put in their place.

    One rank tells nothing; the ranks of one node tell the rate inside it, those of several the rate between, where
    the one inside stays assumed. Latency is assumed, but at most half of what was measured.
    """
    size, nodes = max(1, measured.gradient_bytes), measured.nodes
    if measured.world_size == 1 or not measured.seconds > 0:
        return Communication(size, assumed)
    ranks = measured.world_size // nodes
    if nodes == 1:
        latency, rate = _coefficients(ranks, size, measured.seconds, assumed.node_latency_seconds)
        links = replace(assumed, node_latency_seconds=latency, node_bytes_per_second=rate)
        return Communication(size, links, inside_measured=True)
    inside = _ring(ranks, size, assumed.node_latency_seconds, assumed.node_bytes_per_second)
    left = max(measured.seconds - inside, measured.seconds / 2)  # what was assumed of a node may be too slow
    latency, rate = _coefficients(nodes, size, left, assumed.link_latency_seconds)
    links = replace(assumed, link_latency_seconds=latency, link_bytes_per_second=rate)
    return Communication(size, links, between_measured=True)


def _ring(members: int, size_bytes: int, latency_seconds: float, bytes_per_second: float) -> float:
    return 2 * (members - 1) * (latency_seconds + size_bytes / members / bytes_per_second)


def _coefficients(members: int, size_bytes: int, seconds: float, latency_seconds: float) -> tuple[float, float]:
    """The latency and the rate, in bytes a second, with which `_ring` takes `seconds`."""
    messages = 2 * (members - 1)
    latency = min(latency_seconds, seconds / messages / 2)
    return latency, size_bytes / members / (seconds / messages - latency)


def _rate_text(bytes_per_second: float, latency_seconds: float, is_measured: bool) -> str:
    rate = f"{8 * bytes_per_second / 1e9:.3g} Gbit/s"
    source = "as measured" if is_measured else "assumed"
    return f"{rate} {source}, {1e6 * latency_seconds:.3g} us a message assumed"
