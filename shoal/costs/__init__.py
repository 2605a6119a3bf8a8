"""What private inference will cost, before it is compiled: protocols, machines, links, plans."""
