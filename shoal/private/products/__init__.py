"""Products of the server's weights with the client's encrypted masks, under Microsoft SEAL's BFV scheme."""
