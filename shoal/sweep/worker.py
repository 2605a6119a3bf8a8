"""The program of a worker's process: one shoal command, which ends when the process that started it is gone."""

from __future__ import annotations

import os
import runpy
import signal
import threading


def _end_with_parent() -> None:
    """Kill this process when the other end of its standard input is closed.

    A parent that was killed cannot end its children. A child that continued alone would write into a run folder that a
    resumed sweep has given to another worker.
    """
    while os.read(0, 1):  # not sys.stdin: a waiting thread would hold its lock when the interpreter exits
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the shoal command in `sys.argv`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("shoal", run_name="__main__", alter_sys=True)
