"""The second connection of a session: how a server finds the session that it belongs to.

In its welcome the server gives the client a token. The client opens another connection to the same port, whose first
message contains the token. The token is valid once, only while its session waits for it, and only with the same
certificate as that session.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator

from shoal.private.serving.session import PeerError
from shoal.private.transport.channel import Channel

LINK_SECONDS = 30.0
"""Seconds that a session waits for its second connection."""
TOKEN_BYTES = 32


class Expected:
    """A second connection that a session waits for: its token, and the channel once it is there."""

    def __init__(self, certificate: bytes | None) -> None:
        self.token, self.certificate = secrets.token_hex(TOKEN_BYTES), certificate
        self.channel: Channel | None = None

    def fits(self, token: str, certificate: bytes | None) -> bool:
        """Whether a connection with this token and certificate is the expected one."""
        same = secrets.compare_digest(token.encode(errors="replace"), self.token.encode())
        return same and certificate == self.certificate


class Links:
    """The second connections that the sessions of one server wait for. May be used by several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._expected: list[Expected] = []

    @contextlib.contextmanager
    def expect(self, control: Channel) -> Iterator[Expected]:
        """Within the block, the session of `control` waits for a second connection. The token is not valid later.

        If the block fails, a connection that has come is closed.
        """
        expected = Expected(control.certificate())
        with self._guard:
            self._expected.append(expected)
        done = False
        try:
            yield expected
            done = True
        finally:
            with self._guard:
                if expected in self._expected:
                    self._expected.remove(expected)
            if not done and expected.channel is not None:
                expected.channel.close()

    def hand_over(self, channel: Channel, token: object) -> None:
        """Give `channel` to the session that waits for it. Raises PeerError if there is none; the token stays valid.

        The session then owns `channel`.
        """
        text = token if isinstance(token, str) else ""
        with self._guard:
            found = [e for e in self._expected if e.fits(text, channel.certificate())]
            for expected in found:
                self._expected.remove(expected)
                expected.channel = channel
        if not found:
            raise PeerError(
                f"found a second connection from {channel.name} without the token of a waiting session; need that of "
                "its own session, once and in time; connect again"
            )
