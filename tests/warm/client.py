# What is started as `python`: it hands all that it has to the server, whose fork is the program,
# passes signals on to that, and ends as it does. SOCKET is set before this.
import json
import os
import signal
import socket
import sys

fds = [int(name) for name in os.listdir("/proc/self/fd")]
fds = [fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")]  # but that of the listing
connection = socket.socket(socket.AF_UNIX)
connection.connect(SOCKET)  # type: ignore[name-defined]  # noqa: F821
request = {"argv": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd(), "fds": fds}
request["python"] = sys.argv[0]
request["ignored"] = [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN]
text = json.dumps(request).encode("utf-8", "surrogateescape")
socket.send_fds(connection, [len(text).to_bytes(8, "big")], fds)
passed_on = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is whom to pass them to
connection.sendall(text)
pid = int.from_bytes(connection.recv(8), "big")
for number in passed_on:
    if number not in request["ignored"]:
        signal.signal(number, lambda number, _: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
answer = connection.recv(8)
code = int.from_bytes(answer, "big", signed=True) if answer else 70  # the server is gone
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
