"""The threads of the vCPUs: one each, in the C loop for nearly all of its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..devices.end import GuestEnd
from ..errors import KvmigrateError
from ..kvm.vcpu import RUN_DEBUG, RUN_QUIT, Vcpu, VcpuGroup
from ..threads import Thread
from .exits import ExitHandler

PAUSE_TIMEOUT_MS = 5_000


class CpuThreads:
    """Runs ``vcpus`` in one thread each. They start parked; ``on_debug`` hears of single steps and breakpoints, with
    the group's pause already requested."""

    def __init__(
        self,
        group: VcpuGroup,
        vcpus: Sequence[Vcpu],
        handler: ExitHandler,
        end: Callable[[GuestEnd], None],
    ) -> None:
        self._group = group
        self._vcpus = vcpus
        self._handler = handler
        self._end = end
        self._threads: list[Thread] = []
        self.on_debug: Callable[[Vcpu], None] = lambda _: None

    def start(self) -> None:
        """Start the threads, once. They park at once until the group is resumed."""
        if self._threads:
            return
        for vcpu in self._vcpus:
            thread = Thread(partial(self._run, vcpu))
            self._threads.append(thread)
            thread.start()

    @property
    def thread_ids(self) -> list[int]:
        """The kernel's ids of the vCPUs' threads, in the order of the vCPUs; empty before :meth:`start`."""
        return [thread.native_id for thread in self._threads]

    def stop(self) -> None:
        """Bring every thread back and join it. Must not be called from one of them. Idempotent."""
        self._group.quit()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self, vcpu: Vcpu) -> None:
        try:
            self._loop(vcpu)
        except KvmigrateError as error:
            self._end(GuestEnd.crashed(f"vCPU {vcpu.id} cannot go on: {error}"))
        except Exception as error:
            self._end(GuestEnd.crashed(f"vCPU {vcpu.id} met a fault of kvmigrate's own: {error!r}"))
        finally:
            vcpu.leave()

    def _loop(self, vcpu: Vcpu) -> None:
        while (why := vcpu.run()) != RUN_QUIT:
            if why == RUN_DEBUG:
                self._group.request_pause()
                self.on_debug(vcpu)
            else:
                self._handler.handle(vcpu)
