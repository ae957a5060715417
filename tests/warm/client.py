"""``python client.py SOCKET ARGUMENT...``: have the arguments of a Python run by the server, and end as that does."""

import json
import os
import signal
import socket
import struct
import sys


def is_inherited(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the one that the list was read from
        return False


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
    numbers = sorted(number for number in map(int, os.listdir("/dev/fd")) if number < 3 or is_inherited(number))
    given = {"argv": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd(), "numbers": numbers}
    request = json.dumps(given).encode()
    socket.send_fds(connection, [struct.pack("I", len(request))], numbers)
    connection.sendall(request)
    (code,) = struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
