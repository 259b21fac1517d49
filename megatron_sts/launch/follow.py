"""Helper processes end with the process that started them, however that ends."""

from __future__ import annotations

import os
import threading
import time

INTERVAL_S = 0.5


def end_with_parent(parent: int) -> None:
    """Ends this process, from a thread, when ``parent``, the process that started it, has ended: within a second.

    The kernel would do it at once (``PR_SET_PDEATHSIG``), but it follows the thread that forked, and the thread that starts
    a data loader's workers ends before them.
    """
    threading.Thread(target=_watch, args=(parent,), name="follow", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL_S)
    os._exit(1)
