"""The state of a machine whose guest runs on, for a trial elsewhere: read in several pauses, each as short as can be.

KVM reads a vCPU's state only while that is not in KVM_RUN (its lock is held there), so the vCPUs have to stand still. A
trial sets each item for itself, so not all of them have to be of one moment: the vCPUs are read one in each pause, the
small devices in the last one, and between two pauses the guest runs. Clock, timer, interrupt chips and virtio devices
are read with no pause at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..kvm.vm_state import pack_part
from ..state.section import Section
from .cpus import PAUSE_TIMEOUT_MS
from .platform import Platform
from .runstate import RunStateBox
from .sections import VERSION, kernel_names

GAP = 3.0
"""How much longer than it stood still a guest runs before the next pause."""


class Sampler:
    """Samples ``platform``, whose run state stays as it is. Each pause is under ``guard``, which keeps resets and other
    pauses away; ``may_run`` says whether the guest goes on after it."""

    def __init__(
        self,
        platform: Platform,
        runstate: RunStateBox,
        guard: AbstractContextManager[object],
        may_run: Callable[[], bool],
    ) -> None:
        self._platform = platform
        self._runstate = runstate
        self._guard = guard
        self._may_run = may_run
        self.longest_ms = 0.0
        """The longest pause."""
        self._next_at = 0.0
        """When the guest has run for long enough to be paused again, in seconds of the monotonic clock."""

    def sample(self) -> list[Section]:
        """The sections. Raises :class:`HostError`."""
        vm, devices = self._platform.vm, self._platform.devices
        kernel = [pack_part(vm)]
        bodies = {name: device.sample() for name, device in devices.items() if device.samples_alone}
        for vcpu in vm.vcpus:
            with self._standing_still():
                kernel.append(pack_part(vm, vcpu))
                if vcpu is vm.vcpus[-1]:
                    bodies |= {name: device.sample() for name, device in devices.items() if not device.samples_alone}
        names = kernel_names(len(vm.vcpus))
        return [
            *(Section(name, VERSION, body) for name, body in zip(names, kernel, strict=True)),
            *(Section(name, device.version, bodies[name]) for name, device in devices.items()),
        ]

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """No vCPU runs; the guest is not told, for so short a pause is no news to it."""
        time.sleep(max(self._next_at - time.monotonic(), 0.0))
        with self._guard:
            paused_here, begin = self._runstate.runs, time.monotonic()
            try:
                if paused_here:
                    self._platform.vm.group.pause(PAUSE_TIMEOUT_MS)
                yield
            finally:
                # Only a vCPU ends the guest or asks for a reset, and none can while all are parked: this lets neither
                # an ended one run nor one that waits for its reset.
                if paused_here and self._may_run():
                    self._platform.vm.group.resume()
        if paused_here:
            end = time.monotonic()
            self.longest_ms = max(self.longest_ms, (end - begin) * 1e3)
            self._next_at = end + GAP * (end - begin)
