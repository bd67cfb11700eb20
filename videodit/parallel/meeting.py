"""How the processes of a run find each other: where torch's own ways fail on a second start, or on several nodes."""

import fcntl
import os
import secrets
import socket
import struct
import time
import warnings

import torch.distributed as dist

PATIENCE_S = 60.0
"""After which the first rank says who is still missing."""

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address


def fresh_store(store: dist.Store, rank: int, size: int, limit_s: float) -> dist.Store:
    """A part of the store that no earlier start of the run has written to. Call on every rank.

    torchrun (2.13) keeps one store over its --max-restarts, and its count of restarts need not be the same on all
    nodes: ranks would connect to the addresses of processes that are gone. So rank 0 draws a name, and gives it to
    those that ask with a number of their own, which makes their questions and its answers new.

    Args:
        store: that all ranks see.
        rank, size: this process' place.
        limit_s: how long to wait for the others.
    Raises:
        RuntimeError: if they do not come.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"meeting/ask/{rank}", own)
        name = store.get(f"meeting/answer/{own}").decode()  # waits for it
        store.set(f"meeting/{name}/{rank}", "here")
        return dist.PrefixStore(name, store)
    missing, answered = set(range(1, size)), set()
    start, told = time.monotonic(), False
    while missing:
        for other in sorted(missing):
            if store.check([f"meeting/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"meeting/ask/{other}"]):
                asked = store.get(f"meeting/ask/{other}").decode()
                if asked not in answered:  # it may be of a process that is gone: then a new one will follow
                    answered.add(asked)
                    store.set(f"meeting/answer/{asked}", own)
        waited = time.monotonic() - start
        if waited > limit_s:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {limit_s:.0f} s")
        if waited > PATIENCE_S and not told:
            told = True
            warnings.warn(f"ranks {sorted(missing)} have not come yet: waiting {limit_s:.0f} s at most", stacklevel=2)
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def choose_interface(address: str, port: int) -> None:
    """Has gloo use the network interface from which the run's address is reached, unless GLOO_SOCKET_IFNAME is set.

    Gloo itself takes the address of the host's name, which on many machines is 127.0.1.1, or one of another network.

    Args:
        address, port: the launcher's MASTER_ADDR and MASTER_PORT.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing: only looks for the way
            own = probe.getsockname()[0]
        except OSError:
            return  # no IPv4: leave it to gloo
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(reply[20:24]) == own:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return
