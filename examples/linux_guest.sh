#!/bin/sh
# Boot a Linux with a disk and a network, move it while it runs, and end it.
#
#   linux_guest.sh KERNEL INITRD TAP_HERE TAP_THERE
#
# Both ends are this host, with a tap for each on one bridge; on two hosts the commands are the same, with the second
# host's address in the place of 127.0.0.1 and the image on storage that both see.
set -eu
kernel=$1 initrd=$2 tap_here=$3 tap_there=$4
address=tcp://127.0.0.1:${PORT-4444}
directory=$(mktemp -d)
here= there=
trap 'kill $here $there 2>/dev/null || true; rm -rf "$directory"' EXIT
dd if=/dev/zero of="$directory/disk.img" bs=1024k count=16 2>/dev/null

kvmigrate run "$kernel" --initrd "$initrd" --append "console=ttyS0 quiet" --name web --memory 128M \
    --disk "data=$directory/disk.img" --net "lan=tap:$tap_here" --serial "file:$directory/here" &
here=$!
until grep -q "${READY-login:}" "$directory/here" 2>/dev/null; do kill -0 $here; sleep 1; done

kvmigrate receive "$address" --name web-there \
    --disk "data=$directory/disk.img" --net "lan=tap:$tap_there" --serial "file:$directory/there" &
there=$!
until kvmigrate query web-there >/dev/null; do kill -0 $there; sleep 1; done

kvmigrate check web "$address"
kvmigrate send web "$address"
wait $here || true # it ends with status 6: moved
sleep 5
kvmigrate query web-there
kvmigrate stop web-there
echo "the guest wrote $(wc -c <"$directory/here") bytes here and $(wc -c <"$directory/there") there"
