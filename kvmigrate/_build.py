"""The recipe of the C core, for cffi's API mode: setuptools runs it from the project's root.

Every number, offset and size of the kernel's interface is taken from <linux/kvm.h> when this is compiled; the
files under csrc/cdef/ only say which names Python may see. The core's own interface is csrc/api/, which C includes too.
"""

import os
from pathlib import Path

from cffi import FFI

CSRC = Path("kvmigrate/csrc")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
# KVMIGRATE_CFLAGS lets the tests build the same sources with sanitizers or with planted faults.
EXTRA = os.environ.get("KVMIGRATE_CFLAGS", "").split()

ffibuilder = FFI()
CDEFS = [*sorted((CSRC / "cdef").glob("*.h")), *sorted((CSRC / "api").glob("*.h"))]
ffibuilder.cdef("\n".join(path.read_text() for path in CDEFS))
ffibuilder.set_source(
    "kvmigrate._core",
    '#include "core.h"',
    include_dirs=[str(CSRC)],
    sources=sorted(str(path) for path in CSRC.glob("*.c")),
    depends=sorted(str(path) for path in CSRC.rglob("*.h")),
    extra_compile_args=["-std=gnu11", "-O2", "-D_GNU_SOURCE", "-fvisibility=hidden", *WARNINGS, *EXTRA],
    extra_link_args=[flag for flag in EXTRA if flag.startswith("-fsanitize")],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
