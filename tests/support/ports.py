"""Ports for processes that are told where to meet."""

import socket

_held = []


def free_port():
    """A port of this machine. It stays bound to the end of the tests, so that nobody who asks for any port is given it; who
    asks for this one may listen there all the same, as torch's store does."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return holder.getsockname()[1]
