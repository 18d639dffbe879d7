"""A run directory belongs to one process at a time."""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from .data import InputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory; raises InputError naming the process that does. A dead one does not."""
    path = directory / LOCK
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Otherwise the last holder removed the file after it was opened here.
            ours = os.path.samestat(os.fstat(descriptor), os.lstat(path))
            since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {socket.gethostname()} since {since}".encode())
        except BlockingIOError:
            raise InputError(_in_use(directory, os.read(descriptor, 200))) from None
        except FileNotFoundError:
            ours = False
        except OSError as error:
            raise InputError(f"{directory}: cannot write there: {error.strerror}") from None
        if not ours:
            raise InputError(_in_use(directory, b"that is just ending"))
        stack.callback(path.unlink, missing_ok=True)
        yield


def _in_use(directory: Path, holder: bytes) -> str:
    shown = "".join(filter(str.isprintable, holder.decode(errors="replace")))
    return (
        f"{directory}: in use by process {shown or 'that is just starting'}; wait for it, or choose"
        " another --output"
    )
