#!/bin/sh
# Run a command, and a guest in it, with a network for which nobody has to be root:
#
#   rootless_network.sh kvmigrate run KERNEL --initrd INITRD --append console=ttyS0 --net lan=tap:tap0
#
# pasta (Debian's package passt) makes a network namespace for the command and carries what leaves it by ordinary sockets
# of this user. In it there is a tap, tap0, on one bridge with pasta's end. The guest gets its address by DHCP, which is
# the host's own, and finds the host itself under the gateway's address. PASTA may hold more options for pasta(1).
# Connections do not move with a guest: they are this host's.
set -eu
# shellcheck disable=SC2086 # a list of options
exec pasta --quiet --foreground --ns-ifname host0 ${PASTA-} -- sh -ec '
    ip link add br0 type bridge
    ip tuntap add dev tap0 mode tap
    for name in host0 tap0; do ip link set "$name" master br0 up; done
    ip link set br0 up
    exec "$@"' sh "$@"
