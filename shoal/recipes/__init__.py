"""One package or file a paper: the whole way from a network to a better one."""
