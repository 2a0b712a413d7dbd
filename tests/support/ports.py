"""Ports for servers, and for processes that are told where to meet."""

import socket
from collections import deque

_held = deque(maxlen=100)
"""More than one test asks for, and fewer than a process may have open."""


def free_port():
    """A port of this machine. It stays bound when the test has ended, so that nobody is given it who asks for any: not
    while two processes begin to meet there, and not when a server there has closed, which is to be found gone. Who asks for
    this one may listen there all the same."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return holder.getsockname()[1]
