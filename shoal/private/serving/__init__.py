"""The two parties over a connection: client, server, and all that a session needs."""
