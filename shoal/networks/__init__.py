"""Networks for training: a `Spec`, the module that it describes, and storing both in a run folder."""
