"""What a worker's process runs: one shoal command, which ends when the process that started it is gone."""

from __future__ import annotations

import os
import runpy
import signal
import threading


def _end_with_parent() -> None:
    """Kill this process once nobody holds the other end of its standard input.

    A parent that was killed cannot end its children, and one that goes on by itself would write into a run folder
    that a resumed sweep has given to another worker.
    """
    while os.read(0, 1):  # not sys.stdin, whose lock a thread that waits for it holds while the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the shoal command in `sys.argv`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("shoal", run_name="__main__", alter_sys=True)
