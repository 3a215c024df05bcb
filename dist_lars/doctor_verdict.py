"""What the facts of all ranks mean: pure functions from lists to checks that name node, cause and repair."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from dist_lars.doctor_host import Check, fail, warn

QUOTA = "lfs quota -h, or quota -s, shows the quotas; the environment's files count too: use a container (README.md)"
GB = 1e9
MIN_FREE = {"scratch": 1 * GB, "shared memory": 1 * GB, "run directory": 5 * GB}  # bytes; less is worth a warning
MIN_FILES = 10_000
CLOCK_WARN, CLOCK_FAIL = 1.0, 30.0  # seconds
ETHERNET = 0.1 * GB  # bytes per second; what gigabit Ethernet carries
SLOW = 0.2  # of the best link: no network is that uneven while it is healthy


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory that a rank needs: how much is free there, or why it cannot be used."""

    what: str  # "run directory", "scratch", "shared memory", "staging"
    path: str
    problem: str = ""
    free: float = float("inf")  # bytes
    files: float = float("inf")  # how many more, as far as the file system says


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one rank knows of itself before it talks to the others."""

    rank: int
    host: str
    local_rank: int
    local_size: int
    device: str  # "cpu", or the GPU's name
    device_id: str  # of a GPU, the same for two ranks only if they share it
    gpus_granted: int  # per node, that the job asked SLURM for
    gpus_seen: int  # by torch in this process
    cpu: str
    cores: int
    memory: float  # GB of the host
    operations: str  # of Horovod: "MPI: MPI GLOO NCCL", the controller first
    versions: dict[str, str]
    driver: str = "none"  # CUDA's
    foreign_mpi: str = ""  # an MPI library that is loaded, but not the one that Horovod was built on
    places: tuple[Place, ...] = ()  # the first rank of a node looks for all
    data: str = ""  # "", or why the images cannot be seen from here
    data_fault: str = ""  # "", or what is wrong with them


class Link(NamedTuple):
    """What two neighbours of the ring exchanged: bytes per second in each direction."""

    a: str
    b: str
    rate: float


def judge(facts: Sequence[Facts], cpu_wanted: bool) -> list[Check]:
    """Every check that needs no measurement. `cpu_wanted`: the run was told to train on CPUs."""
    return [
        check_devices(facts, cpu_wanted),
        check_operations(facts),
        check_versions(facts),
        check_cpus(facts),
        check_places(facts),
        check_data(facts),
    ]


def nodes(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """{host: its ranks}, hosts in the order of their first rank."""
    found: dict[str, list[Facts]] = {}
    for one in facts:
        found.setdefault(one.host, []).append(one)
    return found


def node_table(facts: Sequence[Facts]) -> str:
    """One line per node: its ranks, devices, cores and memory."""
    lines = [f"{'node':<16} {'ranks':<12} {'devices':<28} {'cores':>5} {'memory':>8}  processor"]
    for host, own in nodes(facts).items():
        devices = ", ".join(f"{n} x {name}" for name, n in Counter(f.device for f in own).items())
        ranks, cores = spans([f.rank for f in own]), max(f.cores for f in own)
        lines.append(f"{host:<16} {ranks:<12} {devices:<28} {cores:>5} {own[0].memory:>5.0f} GB  {own[0].cpu}")
    return "\n".join(lines)


def spans(numbers: Sequence[int]) -> str:
    """0-3, 8: runs of whole numbers, as people write them."""
    pieces: list[list[int]] = []
    for n in sorted(numbers):
        if pieces and n == pieces[-1][-1] + 1:
            pieces[-1].append(n)
        else:
            pieces.append([n])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in pieces)


def odd_ones(values: Mapping[str, str]) -> str:
    """ "2.14.1 on most nodes, 2.13.0 on n7": how nodes differ, the most common value first; "" when they do not."""
    common = Counter(values.values()).most_common()
    if len(common) == 1:
        return ""
    where = {value: [host for host, own in values.items() if own == value] for value, _ in common}
    most = "most nodes" if len(where[common[0][0]]) > 3 else ", ".join(where[common[0][0]])
    return f"{common[0][0]} on {most}; " + "; ".join(f"{v} on {some(where[v])}" for v, _ in common[1:])


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few of many, once each."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:most]) + (f" and {len(unique) - most} more" if len(unique) > most else "")


def exclude(hosts: Sequence[str]) -> str:
    """What leaves sick nodes out of the next job."""
    return f"sbatch --exclude={','.join(dict.fromkeys(hosts))}, and tell the centre"


def check_devices(facts: Sequence[Facts], cpu_wanted: bool) -> Check:
    """Every rank has a device of its own, of the same kind."""
    name = "devices"
    shared = {(f.host, f.device_id): f for f in facts if f.device_id}
    if len(shared) < sum(1 for f in facts if f.device_id):
        twice = [f for f in facts if f.device_id and shared[f.host, f.device_id] is not f]
        where = f"ranks {twice[0].rank} and {shared[twice[0].host, twice[0].device_id].rank} on {twice[0].host}"
        return fail(name, f"{where} share one GPU", "--gpus-per-node=G with --ntasks-per-node=G, and --gpu-bind=none")
    blind = [f.host for f in facts if f.gpus_granted and f.device == "cpu"]
    if blind and not cpu_wanted:
        fix = "nvidia-smi on that node; `python -m dist_lars.doctor` there; --device cpu if CPUs are meant"
        return fail(name, f"SLURM granted GPUs, but torch sees none on {some(blind)}", fix)
    kind = "--constraint=, or a partition of one kind"
    if words := odd_ones({f"{f.host} (rank {f.rank})": "cpu" if f.device == "cpu" else "a GPU" for f in facts}):
        return fail(name, f"ranks would train on different devices: {words}", kind)
    if words := odd_ones({f"{f.host} (rank {f.rank})": f.device for f in facts}):
        return warn(name, words, f"the slowest sets the pace, the smallest the micro-batch: {kind}")
    per_node = Counter(len(own) for own in nodes(facts).values())
    value = f"{len(facts)} x {facts[0].device} on {len(nodes(facts))} nodes"
    if len(per_node) > 1:
        return warn(name, f"{value}, not the same number on each", "--ntasks-per-node in place of --ntasks")
    return Check(name, "ok", value)


def check_operations(facts: Sequence[Facts]) -> Check:
    """Horovod can do everywhere what it must, by the same way."""
    name = "horovod"
    if words := odd_ones({f.host: f.operations for f in facts}):
        return fail(name, words, "one environment or container for all nodes")
    if foreign := [f for f in facts if f.foreign_mpi]:
        where = some([f.host for f in foreign])
        fix = "unset LD_LIBRARY_PATH and LD_PRELOAD, or unload its module in slurm/site.sh"
        return fail(name, f"loads {foreign[0].foreign_mpi} on {where}, not the MPI that it was built on", fix)
    if facts[0].device != "cpu" and "NCCL" not in facts[0].operations:
        fix = "HOROVOD_GPU_OPERATIONS=NCCL make install"
        return warn(name, f"{facts[0].operations}: gradients travel through the host's memory", fix)
    return Check(name, "ok", facts[0].operations or "one process, no Horovod")


def check_versions(facts: Sequence[Facts]) -> Check:
    """All nodes run the same software."""
    different = {key: odd_ones({f.host: f.versions[key] for f in facts}) for key in facts[0].versions}
    lines = [f"{key} is {words}" for key, words in different.items() if words]
    if lines:
        fix = "one environment on a shared file system, or one container, for all nodes"
        return fail("versions", " / ".join(lines), fix)
    if words := odd_ones({f.host: f.driver for f in facts}):
        return warn("versions", f"CUDA driver {words}", "it works; where it should not, --constraint= or --exclude=")
    shown = ", ".join(f"{key} {facts[0].versions[key]}" for key in ("python", "torch", "horovod", "dist_lars"))
    return Check("versions", "ok", f"equal on all nodes: {shown}")


def check_cpus(facts: Sequence[Facts]) -> Check:
    """Different processors work, at the pace of the slowest."""
    if words := odd_ones({f.host: f.cpu for f in facts}):
        return warn("processors", words, "the slowest sets the pace: --constraint=, or a partition of one kind")
    return Check("processors", "ok", facts[0].cpu)


def check_places(facts: Sequence[Facts]) -> Check:
    """Every node can write where it must, and has room."""
    found = [(f.host, place) for f in facts for place in f.places]
    broken = [(host, place) for host, place in found if place.problem]
    if broken:
        host, first = broken[0]
        more = [h for h, place in broken if place.what == first.what]
        fix = "another folder" + (" by $DIST_LARS_CACHE" if first.what == "cache" else "")
        if "inode" in first.problem or "uota" in first.problem:
            fix = QUOTA
        elif len(set(more)) < len(nodes(facts)):
            fix += ", or " + exclude(more)
        return fail("scratch", f"{first.what} {first.path}: {first.problem}, on {some(more)}", fix)
    for what, least in MIN_FREE.items():
        short = [(host, place) for host, place in found if place.what == what and place.free < least]
        if short:
            value = (
                f"{what} {short[0][1].path} has {short[0][1].free / GB:.1f} GB free on {some([h for h, _ in short])}"
            )
            return warn("scratch", value, f"make room, or choose another folder; {QUOTA}")
    few = [(host, place) for host, place in found if place.files < MIN_FILES]
    if few:
        value = f"{few[0][1].path} takes {few[0][1].files:.0f} more files on {some([h for h, _ in few])}"
        return warn("scratch", value, QUOTA)
    least_free = {place.what: min(p.free for _, p in found if p.what == place.what) for _, place in found}
    return Check("scratch", "ok", "; ".join(f"{what} {free / GB:.0f} GB free" for what, free in least_free.items()))


def check_data(facts: Sequence[Facts]) -> Check:
    """The images can be seen from every node."""
    blind = [f for f in facts if f.data]
    faults = {f.host: f.data_fault for f in facts if f.data_fault}
    if faults and not blind:
        where = "" if len(faults) == len(nodes(facts)) else f", says {some(list(faults))}"
        return fail("data", f"{next(iter(faults.values()))}{where}", 'README.md, "Your own images"')
    if not blind:
        return Check("data", "ok", f"visible on {len(nodes(facts))} nodes")
    everywhere = len(blind) == len(nodes(facts))
    where = "any node" if everywhere and len(blind) > 1 else some([f.host for f in blind])
    fix = "$DIST_LARS_DATA or --data.path names a folder that compute nodes mount, with train/CLASS/image.jpg or shards"
    return fail(
        "data", f"not visible on {where}: {blind[0].data}", fix if everywhere else exclude([f.host for f in blind])
    )


def check_clocks(offsets: Mapping[str, float]) -> Check:
    """Nodes agree about the time; `offsets` are seconds from the median, by host."""
    worst = max(offsets, key=lambda host: abs(offsets[host]))
    value = f"within {max(offsets.values()) - min(offsets.values()):.3f} s of each other"
    if abs(offsets[worst]) < CLOCK_WARN:
        return Check("clocks", "ok", value)
    text = f"that of {worst} is {offsets[worst]:+.1f} s off the others; time limits and file times go by it"
    level: Callable[[str, str, str], Check] = fail if abs(offsets[worst]) >= CLOCK_FAIL else warn
    return level("clocks", text, exclude([worst]))


def check_ring(links: Sequence[Link], size: int) -> Check:
    """No node is far slower than the others; `links` go around the ring, the last one back to the first."""
    name = "links"
    if not links:
        return Check(name, "ok", "one node: no network")
    rates = [link.rate for link in links]
    spread = f"{min(rates) / GB:.3g} to {max(rates) / GB:.3g} GB/s each way, median {median(rates) / GB:.3g}"
    if len(links) == 1:
        return Check(name, "ok", f"{links[0].a} to {links[0].b} {rates[0] / GB:.3g} GB/s each way")
    slow = [link.rate < SLOW * max(rates) for link in links]
    # links[i - 1] and links[i] meet in links[i].a; where the time did not reach around, the first has one neighbour
    closed = links[-1].b == links[0].a
    both = [links[i].a for i in range(0 if closed else 1, len(links)) if slow[i - 1] and slow[i]]
    if both:
        return fail(name, f"{some(both)} is slow to both of its neighbours ({spread})", exclude(both))
    if any(slow):
        pair = " and ".join(f"{link.a} to {link.b}" for link, bad in zip(links, slow, strict=True) if bad)
        return warn(name, f"{pair} is slow ({spread})", "a cable or a switch: tell the centre")
    whole = f"{size} nodes in a ring" if closed else f"the first {len(links) + 1} of {size} nodes"
    return Check(name, "ok", f"{whole}: {spread}")


def check_allreduce(seconds: Sequence[float], size: int, bytes_: int) -> Check:
    """Best time over all ranks -> bus bandwidth, 2 (p - 1) / p times bytes / time, which a ring keeps constant in p."""
    if size == 1:
        return Check("all-reduce", "ok", "one rank: nothing to reduce")
    rate = 2 * (size - 1) / size * bytes_ / min(seconds)
    value = (
        f"{bytes_ / 2**20:.0f} MB over {size} ranks in {1e3 * min(seconds):.1f} ms, bus bandwidth {rate / GB:.3g} GB/s"
    )
    if rate < ETHERNET:
        return warn("all-reduce", f"{value}: is it the fast network?", "INTERFACE=ib0, or as it is called here")
    return Check("all-reduce", "ok", value)
