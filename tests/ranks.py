"""Two processes of one group, as torchrun starts them, but forked: torch is imported once."""

import multiprocessing
import os
import pickle
import socket
import sys
import time

import torch

RANKS = 2
SECONDS = 100  # after which they hang
# A forked process cannot use a GPU, nor autograd where there is one.
CONTEXT = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")


def on_ranks(function, folder, *arguments):
    """function(rank, *arguments) in processes with torchrun's environment, in a folder.

    Returns their exit codes, what they gave (None of one that failed), and what they printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_run, args=(function, rank, port, folder, arguments))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    left = processes
    while left and time.monotonic() < end:
        left = [process for process in left if process.is_alive()]  # (asking takes a dead one away)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    given, printed = [], []
    for rank in range(RANKS):
        file = folder / f"given{rank}"
        given.append(pickle.loads(file.read_bytes()) if file.exists() else None)
        printed.append((folder / f"printed{rank}").read_text())
    return codes, given, printed


def _run(function, rank, port, folder, arguments):
    torch.set_num_threads(1)
    os.chdir(folder)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({key: str(value) for key, value in (address | place).items()})
    code = 1
    with open(f"printed{rank}", "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        try:
            given = function(rank, *arguments)
            (folder / f"given{rank}").write_bytes(pickle.dumps(given))
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
    os._exit(code)  # what the parent registered for its own end is not this one's
