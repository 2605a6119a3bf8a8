"""Groups of calls in a traced forward pass, each converted to operations of a `Graph`."""
