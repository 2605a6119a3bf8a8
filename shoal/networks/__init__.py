"""Networks while they are trained: a `Spec`, its module, and both in a run folder."""
