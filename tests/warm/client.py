"""``python client.py SOCKET ARGUMENT...``: have the arguments of a Python run by the server, and end as that does."""

import json
import os
import signal
import socket
import struct
import sys


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
    request = json.dumps({"argv": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    socket.send_fds(connection, [struct.pack("I", len(request))], [0, 1, 2])
    connection.sendall(request)
    (code,) = struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
