"""The two-party protocol: what both parties compute on secret shares, in the offline and in the online phase."""
