"""How processes that share a folder find each other without a port agreed beforehand.

Rank 0 opens a store on a port that the system chooses and publishes addresses, port and a random token in a file; the
others read the file and believe it only if the store they reach knows the token, so a file left by a dead launch or a
port that now belongs to another job fools nobody.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as torch_dist

from hpcmlip.errors import RunError

_TRY = timedelta(seconds=5)
_TOKEN = "token"


def meet(folder: Path, key: str, *, rank: int, size: int, timeout: timedelta) -> torch_dist.Store:
    """A store that all `size` processes with this key share. Raises RunError after `timeout`."""
    if rank == 0:
        return _host(folder, key, timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        store = _join(_read(_path(folder, key)), timeout)
        if store is not None:
            return store
        time.sleep(0.1)
    raise RunError(
        f"process {rank} of {size} did not find process 0 within {timeout.total_seconds() / 60:g} minutes: "
        f"did it start, and does it see the folder {folder}? Raise engine.timeout_minutes if nodes start late"
    )


def leave(folder: Path, key: str) -> None:
    """Remove the published file; called once all have met."""
    with contextlib.suppress(OSError):
        _path(folder, key).unlink()


def _path(folder: Path, key: str) -> Path:
    return folder / f".rendezvous-{re.sub(r'[^A-Za-z0-9.@-]', '_', key)}.json"


def _host(folder: Path, key: str, timeout: timedelta) -> torch_dist.Store:
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    token = secrets.token_hex(16)
    store.set(_TOKEN, token)
    published = {"addresses": addresses(), "machine": machine(), "port": store.port, "token": token}
    path = _path(folder, key)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(published))
    os.replace(temporary, path)
    return store


def _read(path: Path) -> dict | None:
    try:
        # a listing first: network file systems remember for a while that a file was absent
        os.listdir(path.parent)
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _join(published: dict | None, timeout: timedelta) -> torch_dist.Store | None:
    if published is None:
        return None
    here = published["machine"] == machine()
    for address in ["127.0.0.1"] if here else published["addresses"]:
        try:
            # a look without waiting: the store's own client repeats for its whole timeout where nobody listens
            socket.create_connection((address, published["port"]), timeout=_TRY.total_seconds()).close()
            store = torch_dist.TCPStore(
                address, published["port"], is_master=False, wait_for_workers=False, timeout=_TRY
            )
            if store.get(_TOKEN).decode() == published["token"]:
                store.set_timeout(timeout)
                return store
        except (OSError, RuntimeError):
            continue
    return None


def machine() -> str:
    """The same for all processes of one running machine, containers on it included."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def addresses() -> list[str]:
    """Addresses under which other machines may reach this one, the most likely first; never a loopback."""
    found = [_route_address()]
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    found += [a.address for items in psutil.net_if_addrs().values() for a in items if a.family == socket.AF_INET]
    return list(dict.fromkeys(a for a in found if a and not a.startswith("127.")))


def outward_interface() -> str | None:
    """Name of the network interface that leads to other machines, if there is one."""
    address = _route_address()
    return next((name for name, items in psutil.net_if_addrs().items() if address in [a.address for a in items]), None)


def loopback() -> str | None:
    """Name of the loopback interface."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, items in interfaces if "127.0.0.1" in [a.address for a in items]), None)


def _route_address() -> str | None:
    """Source address of packets to elsewhere; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
            return probe.getsockname()[0]
        except OSError:
            return None
