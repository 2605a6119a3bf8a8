"""The two parties as programs: client, server, their options, and the sessions between them."""
