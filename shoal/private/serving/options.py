"""What an operator or a program may choose for a `Server` and a `Client`: each value, its default and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import ShoalError
from shoal.private.products.workers import RAY, usual_workers

ADDRESS = "127.0.0.1:7766"
"""Where a server listens, and a client looks for it, unless told otherwise."""
PRODUCTS = ("seal", "spu")
"""Who multiplies the server's weights with the client's masks in the offline phase."""
MOST_WORKERS = 256
MOST_ITEMS = 4096
"""Most prepared items of one pool: both parties must be able to send the names of all of them in one message."""
GIB = 1 << 30


def _require(name: str, value: object, need: str, fits: bool, advice: str) -> None:
    if not fits:
        raise ShoalError(f"found {name} {value!r}; need {need}; {advice}")


def _require_whole(name: str, value: object) -> None:
    sound = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(name, value, "a whole number of 1 or more", sound, "choose another")


def _require_gib(name: str, size: float | None) -> None:
    sound = size is None or (math.isfinite(size) and size >= 0)
    _require(name, size, "a number of GiB, 0 or more", sound, "choose another")


def _require_seconds(name: str, seconds: float) -> None:
    sound = math.isfinite(seconds) and seconds >= 0
    _require(name, seconds, "a number of seconds, 0 or more", sound, "choose another")


@dataclass(frozen=True, kw_only=True)
class PartyOptions:
    """What both parties choose, each for itself. Raises ShoalError for values that cannot work."""

    insecure: bool = False
    """For trials: use plain TCP instead of TLS. Allowed on loopback (127.0.0.1) only."""
    timeout_s: float = field(default=120.0, metadata={"cli": "--timeout"})
    """Seconds to wait for the other party in any one step. A server also ends sessions that stay silent for this long
    between two queries."""
    pool: Path | None = None
    """Folder of the prepared items; the folder `pool` next to the artifact if left out."""
    workers: str | None = None
    """Number of processes that compute SEAL's products while items are made. If left out, a server takes one for each
    core, at most 4, and a client, which has less to compute, half as many. "ray" takes one for each CPU of a Ray
    cluster instead, at most 16: the cluster at RAY_ADDRESS, or a local one."""
    spu_threads: int | None = field(default=None, metadata={"cli": None})
    """Threads of an SPU process, at most 8; one for each core if None. The smaller number of both parties counts."""

    def __post_init__(self) -> None:
        sound = math.isfinite(self.timeout_s) and self.timeout_s > 0
        _require("timeout_s", self.timeout_s, "a number of seconds above 0", sound, "choose another")
        if self.spu_threads is not None:
            _require_whole("spu_threads", self.spu_threads)
        text = self.workers
        sound = text is None or text == RAY or (str(text).isdecimal() and 1 <= int(text) <= MOST_WORKERS)
        _require("workers", text, f"a number from 1 to {MOST_WORKERS}, or {RAY}", sound, "leave it out for the default")

    @property
    def hired(self) -> str:
        """The workers that this party takes, also where `workers` leaves it open."""
        return str(self.workers or usual_workers())


@dataclass(frozen=True, kw_only=True)
class ServerOptions(PartyOptions):
    """What a `Server` does beside answering. Raises ShoalError for values that cannot work."""

    pool_gib: float = 4.0
    """Maximum size in GiB of the prepared items that the server keeps for each pool of a client."""
    certificate_gib: float | None = None
    """Maximum size in GiB of all prepared items that the server keeps for one client certificate; half of --disk-gib
    if left out."""
    disk_gib: float = 64.0
    """Maximum size in GiB of all prepared items that the server keeps."""
    memory_gib: float | None = None
    """Memory in GiB for the SPU processes that make items, by an estimate before each starts; what the machine has
    available then if left out."""
    max_pools: int = 64
    """Maximum number of pools (sets of prepared items) that the server keeps for each client certificate."""
    max_clients: int = 8
    """Maximum number of sessions (client connections) at once; more are refused. A client that also makes items takes
    two."""
    certificate_sessions: int | None = None
    """Maximum number of sessions at once of one client certificate; half of --max-clients if left out, but at least
    2."""
    allow: Path | None = None
    """File with the certificates that may connect: the SHA-256 fingerprint of one on each line, as shoal certs shows
    it. If left out, every certificate of the authority may connect. The file is read again for each connection."""
    query_budget: int = 10_000
    """Maximum number of prepared queries answered for one client certificate, counted in budget.json in the folder of
    the prepared items; 0 means no limit."""
    engines: int = 1
    """Maximum number of SPU processes at once. Each client that makes items needs one; clients wait for a free one."""
    early_exit: bool = False
    """Let clients stop an inference at an early exit. The server then learns which exit was taken."""
    products: str = field(default=PRODUCTS[0], metadata={"values": PRODUCTS})
    """Who multiplies the weights with the clients' masks during preparation: seal (Microsoft SEAL; steps whose ring
    has more than 42 bits stay with SPU), or spu (SPU's matrix products, four times as many, and answers that are not
    independent of each other)."""
    weight_cache_gib: float = 2.0
    """Maximum size in GiB of the weights that each session which makes items keeps ready for SEAL's products. A
    ResNet18 fills 2. What does not fit is made ready for every batch again; 0 keeps none."""
    max_batch: int = 32
    """Most items of one batch in preparation. A batch keeps an SPU process until all its items are made."""
    threads: int = field(default=1, metadata={"cli": None})
    """Threads that share each convolution of a query. They sleep while there is none; torch's own threads,
    which do not, are better limited to one with `torch.set_num_threads` then."""
    nice: int = field(default=0, metadata={"cli": None})
    """What is added to the niceness of SPU processes that make items, so that queries come first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_pools", "max_clients", "engines", "max_batch", "threads"):
            _require_whole(name, getattr(self, name))
        if self.certificate_sessions is not None:
            _require_whole("certificate_sessions", self.certificate_sessions)
        _require(
            "products", self.products, f"one of {', '.join(PRODUCTS)}", self.products in PRODUCTS, "choose one of them"
        )
        counted = isinstance(self.query_budget, int) and not isinstance(self.query_budget, bool)
        sound = counted and self.query_budget >= 0
        _require("query_budget", self.query_budget, "a whole number of 0 or more", sound, "choose another")
        for name in ("pool_gib", "certificate_gib", "disk_gib", "memory_gib", "weight_cache_gib"):
            _require_gib(name, getattr(self, name))

    @property
    def sessions_each(self) -> int:
        """The same limit as `certificate_sessions`, with its default."""
        return self.certificate_sessions or max(2, self.max_clients // 2)

    @property
    def pool_bytes(self) -> int:
        """The same limit as `pool_gib`, in bytes."""
        return int(self.pool_gib * GIB)

    @property
    def certificate_bytes(self) -> int:
        """The same limit as `certificate_gib`, with its default, in bytes."""
        return int((self.disk_gib / 2 if self.certificate_gib is None else self.certificate_gib) * GIB)

    @property
    def disk_bytes(self) -> int:
        """The same limit as `disk_gib`, in bytes."""
        return int(self.disk_gib * GIB)

    @property
    def memory_bytes(self) -> int | None:
        """The same limit as `memory_gib`, in bytes."""
        return None if self.memory_gib is None else int(self.memory_gib * GIB)


@dataclass(frozen=True, kw_only=True)
class ClientOptions(PartyOptions):
    """How a `Client` queries. Raises ShoalError for values that cannot work."""

    connect_s: float = field(default=15.0, metadata={"cli": None})
    """Seconds to wait for the server when connecting."""
    pool_wait_s: float = field(default=0.0, metadata={"cli": None})
    """Seconds to wait for another process to release the pool."""
    batch: int = field(default=1, metadata={"cli": None})
    """Most items that are made together, by `keep` and by a query that finds too few."""
    claim_ahead: bool = field(default=False, metadata={"cli": None})
    """Claim the next query's item as soon as a query is answered, so that the next one does not wait for the disk. When
    the session ends, the item that was claimed last is lost."""
    keep: int | None = field(default=None, metadata={"cli": None})
    """Prepared items that a thread keeps ready while the client is open; no thread if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 < self.keep <= MOST_ITEMS:
            raise ShoalError(f"found keep={self.keep}; need 1 to {MOST_ITEMS} items; leave keep out to make none")
        _require_whole("batch", self.batch)
        _require_seconds("connect_s", self.connect_s)
        _require_seconds("pool_wait_s", self.pool_wait_s)

    @property
    def hired(self) -> str:
        """The workers that this party takes, also where `workers` leaves it open."""
        return str(self.workers or max(1, usual_workers() // 2))
