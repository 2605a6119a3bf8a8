"""Counters of a server, and the page and file in which an operator reads them."""
