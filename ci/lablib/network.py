"""The hosts' private link: a bridge in a network namespace of its own.

The namespace has no name and lives as long as a QEMU is in it, so nothing is left behind and
nothing of the machine's own network changes.
"""

import os
import subprocess

from .errors import LabError

MTU = 9000
#: A port for each host, made ahead: a host that is started again finds its port.
SCRIPT = """
ip link set lo up
ip link add br0 type bridge mcast_snooping 0 forward_delay 0
ip link set br0 mtu $1 up
for i in $(seq 0 $(($2 - 1))); do
    ip tuntap add lab$i mode tap vnet_hdr
    ip link set lab$i mtu $1 master br0 up
done
echo ready
read -r wait
"""


def address(index):
    """The host's address on the link."""
    return f"10.7.0.{index + 1}"


def mac(index):
    """The host's Ethernet address."""
    return f"52:54:00:07:00:{index + 1:02x}"


def create(hosts):
    """Makes the namespace with a port for each host; a descriptor of it."""
    maker = subprocess.Popen(["unshare", "--net", "sh", "-ec", SCRIPT, "sh", str(MTU), str(hosts)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if maker.stdout.readline().strip() != "ready":
            reason = maker.stderr.read().strip().replace("\n", "; ")
            raise LabError(f"lab network: {reason or 'unshare failed'}; it needs root, the bridge and the tun module")
        return os.open(f"/proc/{maker.pid}/ns/net", os.O_RDONLY)
    finally:
        maker.stdin.close()
        maker.wait()


def of_process(pid):
    """A descriptor of the namespace that process `pid` is in."""
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)


def command(namespace, argv):
    """`argv` changed to run in the namespace; the descriptor must be passed on."""
    return ["nsenter", f"--net=/proc/self/fd/{namespace}", "--", *argv]


def netdev(index):
    """QEMU's back end for the host's network card."""
    return f"tap,id=link,ifname=lab{index},script=no,downscript=no,vhost=off"
