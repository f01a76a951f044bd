"""The network: names and addresses, InfiniBand; and what takes messages to find: clocks, links, sums."""

from __future__ import annotations

import fcntl
import socket
import statistics
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from ...comm.clocks import ahead
from .base import Check, Ranks, Subject, Trouble, attempt, by_host, some

SKEW = 1.0  # seconds between two clocks: the age of locks and of files that say "alive" is compared with them
_LINK = 1 << 20  # bytes of a message that measures a link
_SLOW = 0.2e9  # bytes a second: Ethernet of 1 Gbit/s has 0.12
_ASK = 1.0  # seconds in which a name should be known
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_MOST = 4  # other hosts whose names are looked up


@dataclass(frozen=True)
class Network:
    """What a rank sees of the network. addresses: IPv4, by interface; unknown: names of hosts that it cannot look up,
    and why; ports: of InfiniBand, and the state of each."""

    host: str
    addresses: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=dict)


def look(ranks: Ranks) -> Network:
    """This rank's. The names of a few other hosts are looked up, by the first rank of each."""
    unknown = {}
    if len(ranks.leaders) > 1 and ranks.rank in ranks.leaders:
        at = ranks.leaders.index(ranks.rank)
        names = [*ranks.topology.names[at:], *ranks.topology.names[:at]][: _MOST + 1]
        for name in names if socket.gethostname() in names else ():  # else they are numbers of HPCMP_NODES
            start = time.monotonic()
            found = attempt(lambda name=name: socket.gethostbyname(name), _ASK)  # type: ignore[misc]
            if isinstance(found, Trouble):
                unknown[name] = found.why
            elif time.monotonic() - start > _ASK:
                unknown[name] = "slow"
    states = {
        f"{port.parts[-3]} port {port.name}": (port / "state").read_text().strip()
        for port in Path("/sys/class/infiniband").glob("*/ports/*")
    }
    return Network(ranks.host, addresses(), unknown, states)


def addresses() -> dict[str, str]:
    """The IPv4 address of each interface that is up, but for loopback."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(ask, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                found[name] = address
    return found


def address_check(ranks: list[Network]) -> Check | list[Check]:
    """Whether an address is that of several hosts, as those of containers' bridges are: MPI would send to itself."""
    holders: dict[tuple[str, str], set[str]] = {}
    for rank in ranks:
        for interface, address in rank.addresses.items():
            holders.setdefault((interface, address), set()).add(rank.host)
    alike = {key: hosts for key, hosts in holders.items() if len(hosts) > 1 and len(_own(ranks, hosts)) > 1}
    if not alike:
        return []
    (interface, address), hosts = next(iter(alike.items()))
    value = f"{interface} has the address {address} on {some(hosts)}: MPI over TCP may send into it, and wait for ever"
    own = [name for name, address in ranks[0].addresses.items() if (name, address) not in alike]
    advice = "name the network between the hosts: `export OMPI_MCA_btl_tcp_if_include=NETWORK UCX_NET_DEVICES=NETWORK`"
    return Check("addresses", "warn", value, advice.replace("NETWORK", own[0]) if own else advice)


def _own(ranks: list[Network], hosts: set[str]) -> set[tuple[tuple[str, str], ...]]:
    """What hosts have for addresses, each once: ranks of one machine have the same."""
    return {tuple(sorted(rank.addresses.items())) for rank in ranks if rank.host in hosts}


def name_check(ranks: list[Network]) -> Check | list[Check]:
    """Whether hosts know one another's names."""
    bad = [rank for rank in ranks if rank.unknown]
    if not bad:
        return []
    name, why = next(iter(bad[0].unknown.items()))
    value = f"{bad[0].host} cannot look up the name {name}: {why}"
    return Check("host names", "warn", value, "ask for all nodes in DNS or in /etc/hosts of each: `getent hosts NAME`")


def port_check(ranks: list[Network]) -> Check | list[Check]:
    """Whether every port of InfiniBand that others have is up."""
    up = {host: sum("ACTIVE" in s for s in there[0].ports.values()) for host, there in by_host(ranks).items()}
    low = [host for host, number in up.items() if number < max(up.values())]
    if not low:
        return []
    value = f"{up[low[0]]} ports are up on {some(low)}, and {max(up.values())} on others"
    return Check("InfiniBand", "warn", value, f"leave {low[0]} out (`--exclude={low[0]}`), and report it: `ibstat`")


def clock_check(ranks: Ranks) -> Check | list[Check]:
    """How far the clocks of hosts are apart, as rank 0 sees them. Collective."""
    found = ahead(ranks.comm, ranks.leaders[1:]) if len(ranks.leaders) > 1 else {}
    apart = ranks.first({ranks.hosts[other]: each for other, each in found.items()})
    if not apart:
        return []
    host, (offset, error) = max(apart.items(), key=lambda item: abs(item[1][0]) - item[1][1])
    if abs(offset) - error > SKEW:
        value = (
            f"that of {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of {ranks.hosts[0]}"
        )
        advice = f"ask for time synchronisation on {host} (`chronyc tracking`, `timedatectl`), or leave it out"
        return Check("clocks", "warn", value, advice)
    return Check("clocks", "ok", f"{abs(offset) * 1e3:.1f} ms apart at most, to within {error * 1e3:.1f} ms")


def link_check(ranks: Ranks) -> Check | list[Check]:
    """The rates at which each host sends to the next, through MPI. Collective."""
    import numpy as np

    comm, leaders, rates = ranks.comm, ranks.leaders, {}
    block = np.zeros(_LINK, np.uint8)
    pairs = list(zip(leaders, leaders[1:] + leaders[:1], strict=True))[: 1 if len(leaders) == 2 else None]
    for here, there in pairs if len(leaders) > 1 else ():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            if ranks.rank == here:
                comm.Send(block, dest=there)
                comm.recv(source=there)
                times.append(time.perf_counter() - start)
            elif ranks.rank == there:
                comm.Recv(block, source=here)
                comm.send(None, dest=here)
        if times:
            rates[(ranks.hosts[here], ranks.hosts[there])] = _LINK / min(times)
    return judge_links({pair: rate for each in ranks.all(rates) for pair, rate in each.items()})


def judge_links(rates: dict[tuple[str, str], float]) -> Check | list[Check]:
    """What is to be said of links between hosts, in bytes a second."""
    if not rates:
        return []
    (here, there), slow = min(rates.items(), key=lambda item: item[1])
    usual = statistics.median(rates.values())
    value = f"{slow / 1e9:.2f} GB/s from {here} to {there}, the slowest of {len(rates)}; {usual / 1e9:.2f} the usual"
    if len(rates) > 2 and slow < usual / 2:
        return Check("links", "warn", value, f"leave out {here} or {there} (`--exclude`), and report it")
    if usual < _SLOW:
        advice = "have MPI take the fast network (`ucx_info -d`; the site's MPI module); keep tp and zero within a node"
        return Check("links", "warn", value, advice)
    return Check("links", "ok", value)


def all_reduce_check(ranks: Ranks) -> Check | list[Check]:
    """Median times of an all-reduce of one number and of 1 MiB. Collective."""
    import numpy as np

    if ranks.comm is None or ranks.comm.size == 1:
        return []
    medians = []
    for size in (1, 2**17):
        x, y, times = np.ones(size), np.empty(size), []
        for _ in range(12):
            start = time.perf_counter()
            ranks.comm.Allreduce(x, y)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times[2:]))
    value = f"8 B in {medians[0] * 1e6:.1f} us, 1 MiB in {medians[1] * 1e3:.2f} ms (MPI, host)"
    return Check("all-reduce", "ok", value)


SUBJECT = Subject("network", look, (address_check, name_check, port_check))
