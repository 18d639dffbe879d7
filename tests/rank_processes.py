"""Where tests start the processes of several ranks: forked off a server that has imported torch once, which
takes each of them seconds."""

import multiprocessing
import socket

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.distributed", "fused_vse"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
