"""The state of a machine whose guest runs on, for a trial elsewhere: read in several pauses, each as short as can be.

KVM reads a vCPU's state only while that is not in KVM_RUN (its lock is held there), so the vCPUs have to stand still. A
trial sets each item for itself, so not all of them have to be of one moment: the vCPUs are read one in each pause, and
between two pauses the guest runs. Clock, timer, interrupt chips and virtio devices are read with no pause at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..kvm.vcpu_state import save_vcpu
from ..kvm.vm_state import save_vm
from ..state.section import Section
from .cpus import PAUSE_TIMEOUT_MS
from .platform import Platform
from .runstate import RunStateBox
from .sections import kernel_section

GAP = 3.0
"""How much longer than it stood still a guest runs before the next pause."""


class Sampler:
    """Samples ``platform``, whose run state stays as it is."""

    def __init__(self, platform: Platform, runstate: RunStateBox) -> None:
        self._platform = platform
        self._runstate = runstate
        self.longest_ms = 0.0
        """The longest pause."""

    def sample(self) -> list[Section]:
        """The sections. Raises :class:`HostError`."""
        vm = self._platform.vm
        sections = [kernel_section("vm", save_vm(vm))]
        for vcpu in vm.vcpus:
            with self._standing_still():
                body = save_vcpu(vcpu)
            sections.append(kernel_section(f"vcpu{vcpu.id}", body))
        devices = self._platform.devices
        bodies = {name: device.sample() for name, device in devices.items() if device.samples_alone}
        with self._standing_still():
            bodies |= {name: device.sample() for name, device in devices.items() if not device.samples_alone}
        return sections + [Section(name, device.version, bodies[name]) for name, device in devices.items()]

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """No vCPU runs; the guest is not told, for so short a pause is no news to it."""
        if not self._runstate.runs:
            yield
            return
        group, begin = self._platform.vm.group, time.monotonic()
        try:
            group.pause(PAUSE_TIMEOUT_MS)
            yield
        finally:
            # Only a vCPU ends the guest, and none can while all are parked: this does not let an ended one run.
            if self._runstate.runs:
                group.resume()
        passed = time.monotonic() - begin
        self.longest_ms = max(self.longest_ms, passed * 1e3)
        time.sleep(GAP * passed)
