"""Boot an image, let its serial port write to a file, wait until the guest ends, and look at how it ended.

    python examples/boot_an_image.py [IMAGE [COMMAND LINE]]

Without an image: the ledger guest of this package, which checks its own memory for a second and powers off.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kvmigrate import BootConfig, Machine, MachineConfig, guests


def main(arguments: list[str]) -> int:
    image = Path(arguments[0]) if arguments else guests.path("ledger")
    cmdline = arguments[1] if len(arguments) > 1 else "" if arguments else "seconds=1"
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "serial"
        boot = BootConfig(image, cmdline=cmdline)
        machine = Machine.create(MachineConfig("example", memory_bytes=64 << 20, serial=f"file:{output}", boot=boot))
        try:
            machine.start()
            machine.resume()
            end = machine.wait_end(60)
        finally:
            machine.close()
        print(output.read_text(errors="replace")[-500:], end="")
    if end is None:
        print("the guest still runs after a minute; it was ended")
        return 1
    print(f"{end.text}: exit status {end.exit_status}")
    return end.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
