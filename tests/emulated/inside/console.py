"""Linux finds the console as hvc0: what it writes there comes out, what is typed comes in, and a move loses nothing."""

from __future__ import annotations

from tests.oracle.world import POWERED_OFF, World

from .linux import TROUBLE, boot, said, world
from .storage import move

__all__ = ["world"]

NR_LINES = 200
READER = '(stty raw -echo; while read -r line; do echo "got $line"; done) < /dev/hvc0 > /tmp/got &'
WRITER = f"(i=0; while [ $i -lt {NR_LINES} ]; do echo line $i; i=$((i+1)); usleep 50000; done) > /dev/hvc0 &"


def test_hvc0_goes_on_over_a_move_with_every_line_once(world: World) -> None:
    here, leads_here = world.recorder.listen("console here")
    there, leads_there = world.recorder.listen("console there")
    guest = boot(world, 1, "--console", leads_here)
    said(guest, READER)
    said(guest, "usleep 500000; echo hello > /dev/hvc0")
    here.wait_for("hello\n")
    here.send("one\n")
    said(guest, "until grep -q one /tmp/got; do usleep 100000; done")
    said(guest, WRITER)
    here.wait_for("line 3\n")
    destination = move(world, guest, "--console", leads_there)
    there.send("two\n")
    said(destination, "until grep -q two /tmp/got; do usleep 100000; done")
    assert said(destination, "cat /tmp/got") == ["got one", "got two"]
    there.wait_for(f"line {NR_LINES - 1}\n", 120)
    assert "line" in there.text, "the move was in the middle"
    assert (here.text + there.text).splitlines() == ["hello", *(f"line {at}" for at in range(NR_LINES))]
    assert not (trouble := said(destination, TROUBLE)), trouble
    destination.log.send("poweroff -f\n")
    assert destination.wait_end() == POWERED_OFF, destination.stderr
