"""Runs a program in a network and a process table of its own: for topology `direct`, whose parts listen on every interface.

    python -m benchmarks.cluster.own_network COMMAND ...     only inside such a network: brings the loopback up, becomes the command

Knows Linux's `unshare`; knows nothing about what is run.
"""

import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def in_own_network(command: Sequence[str]) -> list[str]:
    """The command line that runs `command`, from the root of the checkout; when it is killed, everything it started ends with it."""
    become_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    unshare = ["unshare", *become_root, "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return [*unshare, sys.executable, "-m", "benchmarks.cluster.own_network", *command]


def why_not() -> str | None:
    """Why this machine gives no network of one's own; None where it does."""
    try:
        tried = subprocess.run(in_own_network(["true"]), cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError as error:
        return f"there is no unshare here: {error}"
    return None if tried.returncode == 0 else f"unshare is not permitted here: {tried.stderr.strip()[-200:]}"


def direct_environment(folder: Path) -> dict[str, str]:
    """What topology `direct` needs in the environment of a cluster on this machine, its HAProxy's files in `folder`."""
    from deploy.direct import DIRECT_ENV  # loads Ray, which the program above does not need
    from deploy.local import SERVE_ENV

    files: Mapping[str, str] = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    }
    paths = {name: str(folder / file) for name, file in files.items()}
    return {**SERVE_ENV, **DIRECT_ENV, **paths, "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}


def _flags(control: socket.socket, interface: str) -> int:
    asked = struct.pack("16sh22x", interface.encode(), 0)
    return int(struct.unpack_from("16xh", fcntl.ioctl(control, _SIOCGIFFLAGS, asked))[0])


def _loopback_up() -> None:
    """Bring the loopback up; ends the program where another interface is up, for then this is the machine's network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        others = [name for _, name in socket.if_nameindex() if name != "lo"]
        if any(_flags(control, name) & _IFF_UP for name in others):
            sys.exit("This is not a network of its own; start it through in_own_network.")
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _flags(control, "lo") | _IFF_UP))


if __name__ == "__main__":
    _loopback_up()
    os.execvp(sys.argv[1], sys.argv[1:])
