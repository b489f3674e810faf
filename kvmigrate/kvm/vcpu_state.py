"""The whole state of one vCPU as a value: saved, checked, loaded, read back.

Sources of the rules: [api] Documentation/virt/kvm/api.rst; [fc] Firecracker, src/vmm/src/vstate/vcpu; [qemu] QEMU,
target/i386/kvm/kvm.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from .._core import lib
from ..errors import BadField, HostError, check
from ..record import dataclass
from ..state.fidelity import Fidelity
from ..state.section import Fields, Value, unpack
from . import msr_names as msr
from .clock import ClockBase
from .cpuid import compare_cpuid, parse_cpuid
from .host import CpuidEntry
from .lapic import compare_lapic
from .msrs import drop_wall_clocks, load_msrs, load_wall_clocks, parse_msrs
from .steps import Outcome
from .structs import layout
from .tsc import SavedTsc, load_tsc, load_tsc_deadline, load_tsc_khz
from .vcpu import Vcpu
from .vcpu_image import STRUCTS, VcpuImage, image_of
from .xsave import compare_xsave, parse_xsave

MAX_NESTED_BYTES = 64 << 10
_MAX_KHZ = 100_000_000


@dataclass(frozen=True, slots=True)
class ParsedVcpu:
    """A vCPU's state that was checked; nothing of it is set yet. What fits this host lies in the vCPU's image, ready to
    be set; the items ``odd`` do not, and are set one by one: ``sregs`` and ``nested_state`` from here."""

    cpuid: list[CpuidEntry]
    cpuid_packed: bytes
    image: VcpuImage
    tsc: SavedTsc
    msrs: Mapping[int, int]
    """All MSRs, or at least those that have steps of their own."""
    odd: frozenset[str] = frozenset()
    sregs: bytes = b""
    nested_state: bytes | None = None


def parse_vcpu(vcpu: Vcpu, body: Value, cpuid: Value) -> ParsedVcpu:
    """Check all of a saved body, which is hostile, before any of it is set: exact keys, types, ranges and lengths.
    ``body`` is a map, or one in msgpack, which costs next to nothing when it is of a host with the same MSRs.

    Raises :class:`BadField`, or :class:`RestoreRefused` for an XSAVE area that this host's CPU cannot load."""
    where, image = f"vcpu{vcpu.id}", image_of(vcpu)
    entries, packed_entries = parse_cpuid(cpuid, vcpu.cpuid, f"{where}.cpuid")
    if image.take(body):
        return _taken(vcpu, image, entries, packed_entries, where)
    fields = Fields(unpack(body, where) if isinstance(body, bytes) else body, where)
    parsed = _filled(vcpu, image, fields, entries, packed_entries, where)
    fields.done()
    return parsed


def _taken(
    vcpu: Vcpu, image: VcpuImage, cpuid: list[CpuidEntry], cpuid_packed: bytes, where: str
) -> ParsedVcpu:
    """What has the shape of this host's own state: the ranges are left to be checked."""
    memory = image.memory
    flags, khz, own = memory.xcrs.flags, memory.tsc_khz[0], memory.number[0]
    if flags or own != vcpu.id or not 1 <= khz <= _MAX_KHZ:
        raise BadField(f"{where}: xcrs.flags is {flags}, id {own} and tsc_khz {khz}, which no vCPU {vcpu.id} has")
    parse_xsave(memory.saved_bytes("xsave"), vcpu.host, vcpu.xsave_bytes, f"{where}.xsave")
    offset = None if memory.tsc_offset is None else memory.tsc_offset[0]
    msrs = image.msrs_apart()
    image.ask_no_time()
    return ParsedVcpu(cpuid, cpuid_packed, image, SavedTsc(khz, msrs.get(msr.IA32_TSC, 0), offset), msrs)


def _filled(
    vcpu: Vcpu, image: VcpuImage, fields: Fields, cpuid: list[CpuidEntry], cpuid_packed: bytes, where: str
) -> ParsedVcpu:
    """What was saved on a host with other MSRs, an older kernel, another CPU; or cannot be right."""
    image.memory.clear()
    fields.integer("id", vcpu.id, vcpu.id)
    sregs = "sregs2" if fields.has("sregs2") else "sregs"
    packed = {key: layout(key).pack(fields.mapping(key), f"{where}.{key}") for key in (sregs, *_PLAIN)}
    packed["lapic"] = layout("lapic_state").pack(fields.mapping("lapic"), f"{where}.lapic")
    packed["xcrs"] = parse_xcrs(fields.mapping("xcrs"), f"{where}.xcrs")
    msrs = parse_msrs(fields.mapping("msrs"), f"{where}.msrs")
    nested = fields.blob("nested_state", MAX_NESTED_BYTES) if fields.has("nested_state") else None
    offset = fields.integer("tsc_offset") if fields.has("tsc_offset") else None
    tsc = SavedTsc(fields.integer("tsc_khz", 1, _MAX_KHZ), msrs.get(msr.IA32_TSC, 0), offset)
    packed["xsave"] = parse_xsave(fields.blob("xsave", 1 << 20), vcpu.host, vcpu.xsave_bytes, f"{where}.xsave")
    odd: set[str] = set() if nested is None and not image.has_nested_state else {"nested_state"}
    odd |= set() if sregs == image.sregs else {"sregs"}
    for key, data in packed.items():
        if key in image.memory.parts:
            image.memory.fill(key, data)
    if not image.msrs.fill(image.memory.msrs, msrs):
        odd.add("msrs")
    image.ask_no_time()
    return ParsedVcpu(cpuid, cpuid_packed, image, tsc, msrs, frozenset(odd), packed[sregs], nested)


def parse_xcrs(value: dict[str, Value], where: str) -> bytes:
    """Check the extended control registers that there are, of the 16 that the struct has room for. Raises
    :class:`BadField`."""
    fields = Fields(value, where)
    flags = fields.integer("flags", 0, 0)
    nr_xcrs = fields.integer("nr_xcrs", 0, lib.KVM_MAX_XCRS)
    xcrs = fields.sequence("xcrs", nr_xcrs)
    fields.done()
    if len(xcrs) != nr_xcrs:
        raise BadField(f"{where}: nr_xcrs is {nr_xcrs}, but there are {len(xcrs)}")
    whole = xcrs + [{"xcr": 0, "value": 0}] * (lib.KVM_MAX_XCRS - nr_xcrs)
    return layout("xcrs").pack({"nr_xcrs": nr_xcrs, "flags": flags, "xcrs": whole}, where)


_PLAIN = ("regs", "debugregs", "mp_state", "vcpu_events")


class _Loader:
    """Sets one item after another and judges each; an item that the kernel refuses is refused by name, and the rest is
    set all the same, so that the result tells of everything that is wrong at once."""

    def __init__(self, vcpu: Vcpu, parsed: ParsedVcpu, base: ClockBase) -> None:
        self.vcpu = vcpu
        self.parsed = parsed
        self.base = base
        self.fidelity = Fidelity()
        self.khz = 0
        self.where = f"vcpu{vcpu.id}"

    def load(self) -> Fidelity:
        """Set all items in :data:`ORDER`: as many as can be by one call into the C core."""
        for together, items in _calls(tuple(ORDER), self.parsed.odd, self.parsed.image.has_nested_state):
            if not together:
                self._step(items[0])
                continue
            for item, outcome in zip(items, self.parsed.image.load(items), strict=True):
                self._judge(item, outcome)
        return self.fidelity

    def _step(self, item: str) -> None:
        where = f"{self.where}.{item}"
        try:
            getattr(self, f"_{item}")(where)
        except HostError as error:
            self._refused(where, error)

    def _refused(self, where: str, error: HostError) -> None:
        self.fidelity.refused(where, None, None, f"the kernel refused it: {error}")

    def _judge(self, item: str, outcome: Outcome) -> None:
        where = f"{self.where}.{item}"
        if outcome.exact and item != "msrs":
            self.fidelity.exact(where)
            return
        try:
            check(outcome.rc, f"KVM_SET of {item}")
            if item == "msrs":
                self._msrs_written(outcome.exact, where)
            else:
                self._compare(item, where)
        except HostError as error:
            self._refused(where, error)

    def _compare(self, item: str, where: str) -> None:
        """What was not read back byte for byte as it was set: padding, a timer that goes on, or a loss."""
        image = self.parsed.image
        key = image.key(item)
        saved, held = image.memory.saved_bytes(key), image.memory.held_bytes(key)
        if item == "lapic":
            compare_lapic(saved, held, self.fidelity, where)
        elif item == "xsave":
            compare_xsave(saved, held, self.fidelity, where)
        elif item == "nested_state":
            self.fidelity.compare(where, saved, held)
        else:
            self.fidelity.compare(where, layout(key).unpack(saved), layout(key).unpack(held))

    def _msrs_written(self, exact: bool, where: str) -> None:
        """The MSRs that have no step of their own stand in the vCPU; or some do not, and each is set and judged."""
        table = self.parsed.image.msrs
        if exact:
            dropped = drop_wall_clocks(self.parsed.msrs, self.fidelity, where)
            names = table.compared_names
            self.fidelity.all_exact(where, [name for name in names if name not in dropped] if dropped else names)
            self._tsc(where)
        else:
            self._each_msr(table.values(self.parsed.image.memory.msrs), where)

    def _msrs(self, where: str) -> None:
        self._each_msr(self.parsed.msrs, where)

    def _each_msr(self, msrs: Mapping[int, int], where: str) -> None:
        load_msrs(self.vcpu, msrs, self.fidelity, where)
        load_wall_clocks(self.vcpu, self.parsed.msrs, self.fidelity, where)
        self._tsc(where)

    def _tsc(self, where: str) -> None:
        """The TSC after the other MSRs, TSC_DEADLINE after the TSC."""
        off = load_tsc(self.vcpu, self.parsed.tsc, self.khz, self.base, self.fidelity, where)
        load_tsc_deadline(self.vcpu, self.parsed.msrs, off, self.fidelity, where)

    def _cpuid(self, where: str) -> None:
        parsed, vcpu = self.parsed, self.vcpu
        if not parsed.cpuid_packed:
            # The vCPU was made with it, and whoever made it compared its features (the machine does, before the guest
            # has to wait).
            self.fidelity.exact(where)
            return
        self.fidelity.merge(compare_cpuid(parsed.cpuid, vcpu.offered_cpuid, where))
        vcpu.set_cpuid2_packed(parsed.cpuid_packed)
        _compare_entries(parsed.cpuid, vcpu.cpuid, self.fidelity, where)

    def _sregs(self, where: str) -> None:
        """In the other form than this host's own: without the PDPTRs, or with them."""
        if self.parsed.image.sregs == "sregs":
            self.fidelity.refused(where, "sregs2", "sregs", "this host's kernel lacks KVM_CAP_SREGS2")
            return
        saved = self.parsed.sregs
        self.vcpu.set_packed("sregs", saved)
        held = self.vcpu.get_packed("sregs")
        self.fidelity.compare(where, layout("sregs").unpack(saved), layout("sregs").unpack(held))

    def _nested_state(self, where: str) -> None:
        saved = self.parsed.nested_state
        if saved is None:
            return
        size_bytes = self.vcpu.host.nested_state_bytes
        if not size_bytes:
            self.fidelity.refused(where, len(saved), None, "this host's kernel lacks KVM_CAP_NESTED_STATE")
            return
        self.vcpu.set_nested_state(saved)
        self.fidelity.compare(where, saved, self.vcpu.get_nested_state(size_bytes))

    def _tsc_khz(self, where: str) -> None:
        self.khz = load_tsc_khz(self.vcpu, self.parsed.tsc.khz, self.fidelity, where)


ORDER = (
    # First: MSRs that depend on CPUID read as 0 otherwise (Linux 6.13, Firecracker #6120), and the kernel takes no
    # other CPUID any more once the vCPU ran (Linux 5.16).
    "cpuid",
    # Before the TSC, whose offset is in scaled cycles.
    "tsc_khz",
    # Before the local APIC, which it may change [fc].
    "mp_state",
    # EFER and CR4 before nested state, and that before the registers [qemu]; the APIC base before the local APIC, whose
    # mode it is.
    "sregs",
    "nested_state",
    # Before the events: setting registers clears a pending exception [api].
    "regs",
    "xsave",
    "xcrs",
    "debugregs",
    # Before the MSRs: the local APIC's timer mode decides whether TSC_DEADLINE counts [fc #4666].
    "lapic",
    # With the TSC after the other MSRs, and TSC_DEADLINE after the TSC.
    "msrs",
    # Last: every step before may change what is pending [fc].
    "vcpu_events",
)
"""The order of a load, which is a rule."""


def load_vcpu(vcpu: Vcpu, parsed: ParsedVcpu, base: ClockBase) -> Fidelity:
    """Set all of a vCPU that has never run in :data:`ORDER`, read every item back and judge it."""
    return _Loader(vcpu, parsed, base).load()


@lru_cache(16)
def _calls(order: tuple[str, ...], odd: frozenset[str], has_nested_state: bool) -> list[tuple[bool, list[str]]]:
    """``order`` in pieces: items that are set together, and those that are set alone."""
    left_out = set() if has_nested_state or "nested_state" in odd else {"nested_state"}
    return [*_pieces([item for item in order if item not in left_out], odd)]


def _pieces(order: Sequence[str], odd: frozenset[str]) -> Iterator[tuple[bool, list[str]]]:
    together: list[str] = []
    for item in order:
        alone = item in odd or item not in STRUCTS
        # What follows the MSRs comes after the TSC, which is set after them.
        if together and (alone or together[-1] == "msrs"):
            yield True, together
            together = []
        if alone:
            yield False, [item]
        else:
            together.append(item)
    if together:
        yield True, together


def _compare_entries(saved: list[CpuidEntry], held: list[CpuidEntry], fidelity: Fidelity, where: str) -> None:
    """CPUID entries that the kernel changed, by leaf: bits that follow the guest's own CR4 and MSRs are adjusted."""
    if held == saved:
        fidelity.exact(where)
        return
    now = {(entry["function"], entry["index"]): entry for entry in held}
    for entry in saved:
        leaf = entry["function"], entry["index"]
        name = f"{where}.{leaf[0]:x}.{leaf[1]}"
        other = now.pop(leaf, None)
        if other == entry:
            fidelity.exact(name)
        elif leaf[0] in (1, 7, 0xD):
            fidelity.adjusted(name, entry, other, "the kernel derives it from the guest's control registers")
        else:
            fidelity.refused(name, entry, other, "the host took the value and holds another")
    for leaf, entry in now.items():
        fidelity.refused(f"{where}.{leaf[0]:x}.{leaf[1]}", None, entry, "the host added an entry")
