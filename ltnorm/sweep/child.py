"""`python -m ltnorm.sweep.child COMMAND ...`: a command line that ends when its parent does.

Its stdin is a pipe from the parent, into which nothing is ever written: its end is the parent's.
"""

import os
import signal
import sys
import threading
import time

from ltnorm.cli import main

# For a checkpoint to be saved.
GRACE = 5.0


def _end_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(143)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main())
