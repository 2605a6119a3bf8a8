"""What an operator or a program may choose for a `Server` and a `Client`: each value, its default and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import ShoalError

ADDRESS = "127.0.0.1:7766"
"""Where a server listens, and a client looks for it, unless told otherwise."""
MODES = ("prepared", "direct")
PRODUCTS = ("spu", "seal")
"""Who multiplies the server's weights with the client's masks in the offline phase."""
MOST_ITEMS = 4096
"""Most prepared items of one pool: both parties must be able to send the names of all of them in one message."""
GIB = 1 << 30


def _require(name: str, value: object, need: str, fits: bool, advice: str) -> None:
    if not fits:
        raise ShoalError(f"found {name} {value!r}; need {need}; {advice}")


def _require_whole(name: str, value: object) -> None:
    sound = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(name, value, "a whole number of 1 or more", sound, "choose another")


def _require_port(name: str, port: int | None) -> None:
    _require(name, port, "a port from 1 to 65535", port is None or 1 <= port <= 65535, "leave it out for a free one")


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
    spu_threads: int | None = field(default=None, metadata={"cli": None})
    """Threads of an SPU process, at most 8; one for each core if None. The smaller number of both parties counts."""

    def __post_init__(self) -> None:
        sound = math.isfinite(self.timeout_s) and self.timeout_s > 0
        _require("timeout_s", self.timeout_s, "a number of seconds above 0", sound, "choose another")
        if self.spu_threads is not None:
            _require_whole("spu_threads", self.spu_threads)


@dataclass(frozen=True, kw_only=True)
class ServerOptions(PartyOptions):
    """What a `Server` does beside answering. Raises ShoalError for values that cannot work."""

    pool_gib: float = 4.0
    """Maximum size in GiB of the prepared items that the server keeps for each pool of a client."""
    max_pools: int = 64
    """Maximum number of pools (sets of prepared items) that the server keeps for each client certificate."""
    max_clients: int = 8
    """Maximum number of sessions (client connections) at once; more are refused. A client that also makes items takes
    two."""
    engines: int = 1
    """Maximum number of SPU processes at once. Each direct query and each preparation needs one; clients wait for a
    free one."""
    early_exit: bool = False
    """Let clients stop an inference at an early exit. The server then learns which exit was taken."""
    link_port: int | None = None
    """Port on which SPU's own connection listens; a free one if left out."""
    products: str = field(default=PRODUCTS[0], metadata={"values": PRODUCTS})
    """Who multiplies the weights with the clients' masks during preparation: spu (SPU's matrix products), or seal
    (Microsoft SEAL, a quarter of the ciphertext products; needs seal-python at both parties). Steps whose
    ring has more than 42 bits stay with SPU."""
    max_batch: int = field(default=128, metadata={"cli": None})
    """Most images of one direct query, and most items of one batch in preparation."""
    shared_weights: bool = field(default=False, metadata={"cli": None})
    """In direct mode, secret-share the weights with the client instead of keeping them. It doubles the work and is
    there for comparison only."""
    threads: int = field(default=1, metadata={"cli": None})
    """Threads that share each convolution of a prepared query. They sleep while there is none; torch's own threads,
    which do not, are better limited to one with `torch.set_num_threads` then."""
    nice: int = field(default=0, metadata={"cli": None})
    """What is added to the niceness of SPU processes that make items, so that queries come first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_pools", "max_clients", "engines", "max_batch", "threads"):
            _require_whole(name, getattr(self, name))
        _require(
            "products", self.products, f"one of {', '.join(PRODUCTS)}", self.products in PRODUCTS, "choose one of them"
        )
        room = math.isfinite(self.pool_gib) and self.pool_gib >= 0
        _require("pool_gib", self.pool_gib, "a number of GiB, 0 or more", room, "choose another")
        _require_port("link_port", self.link_port)

    @property
    def pool_bytes(self) -> int:
        """The same limit as `pool_gib`, in bytes."""
        return int(self.pool_gib * GIB)


@dataclass(frozen=True, kw_only=True)
class ClientOptions(PartyOptions):
    """How a `Client` queries. Raises ShoalError for values that cannot work.

    SPU's own connection goes both ways: the server also connects to the client, at the address that the client came
    from and a free port. Where that is not possible, give `client_address`.
    """

    client_address: str | None = None
    """host:port at which the server reaches this machine for SPU's own connection. This machine then listens on that
    port of all its interfaces. If left out, the server uses the address that the connection came from and a free
    port."""
    mode: str = field(default=MODES[0], metadata={"cli": None})
    """"prepared" spends one prepared item an image; "direct" computes everything in SPU when the query comes."""
    connect_s: float = field(default=15.0, metadata={"cli": None})
    """Seconds to wait for the server when connecting."""
    pool_wait_s: float = field(default=0.0, metadata={"cli": None})
    """Seconds to wait for another process to release the pool."""
    batch: int = field(default=1, metadata={"cli": None})
    """In prepared mode, items that `keep` makes together. In direct mode, images of a query that is compiled at
    setup; other sizes are compiled when they are first used."""
    claim_ahead: bool = field(default=False, metadata={"cli": None})
    """In prepared mode, claim the next query's item as soon as a query is answered, so that the next one does not wait
    for the disk. When the session ends, the item that was claimed last is lost."""
    keep: int | None = field(default=None, metadata={"cli": None})
    """Prepared items that a thread keeps ready while the client is open; no thread if None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("mode", self.mode, f"one of {', '.join(MODES)}", self.mode in MODES, "choose one of them")
        if self.keep is not None and (self.mode != "prepared" or not 0 < self.keep <= MOST_ITEMS):
            raise ShoalError(
                f"found keep={self.keep} in mode {self.mode!r}; need prepared mode and 1 to {MOST_ITEMS} items; "
                "leave keep out to make none"
            )
        _require_whole("batch", self.batch)
        _require_seconds("connect_s", self.connect_s)
        _require_seconds("pool_wait_s", self.pool_wait_s)
