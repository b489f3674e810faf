"""The whole state of one vCPU as a value: saved, checked, loaded, read back.

Sources of the rules: [api] Documentation/virt/kvm/api.rst; [fc] Firecracker, src/vmm/src/vstate/vcpu; [qemu] QEMU,
target/i386/kvm/kvm.c.
"""

from __future__ import annotations

from .._core import lib
from ..errors import BadField, HostError
from ..record import dataclass
from ..state.fidelity import Fidelity
from ..state.section import Fields, Value
from . import msr_names as msr
from .clock import ClockBase
from .cpuid import compare_cpuid, parse_cpuid
from .host import CpuidEntry
from .lapic import compare_lapic
from .msrs import load_msrs, parse_msrs, save_msrs
from .structs import layout
from .tsc import SavedTsc, load_tsc, load_tsc_deadline, load_tsc_khz
from .vcpu import Vcpu
from .xsave import compare_xsave, parse_xsave

MAX_NESTED_BYTES = 64 << 10
_MAX_KHZ = 100_000_000


def save_vcpu(vcpu: Vcpu) -> dict[str, Value]:
    """The state of ``vcpu``, which must be parked. Raises :class:`HostError`.

    Order, which no reader of the body depends on, but what it holds does:

    1. MP_STATE: reading it takes a pending INIT or SIPI, which changes registers and the local APIC [fc].
    2. MSRs before the LAPIC: a deadline timer that fires in between is then saved as armed and due, and raised, and the
       guest sees one interrupt too many; the other way round it would be in neither and the guest might wait for ever
       (Firecracker #4618). Registers and XSAVE at any time.
    3. VCPU_EVENTS last: the other reads may change what is pending [fc].
    """
    body: dict[str, Value] = {"id": vcpu.id, "mp_state": vcpu.get_mp_state()}
    body["regs"] = vcpu.get_regs()
    sregs = "sregs2" if vcpu.host.has_sregs2 else "sregs"
    body[sregs] = layout(sregs).unpack(vcpu.get_packed(sregs))
    body["xsave"] = vcpu.get_xsave()
    body["xcrs"] = trim_xcrs(vcpu.get_xcrs())
    body["debugregs"] = vcpu.get_debugregs()
    body["msrs"] = save_msrs(vcpu)
    body["lapic"] = vcpu.get_lapic()
    if vcpu.host.nested_state_bytes:
        body["nested_state"] = vcpu.get_nested_state(vcpu.host.nested_state_bytes)
    body["tsc_khz"] = vcpu.get_tsc_khz()
    if vcpu.has_tsc_offset():
        body["tsc_offset"] = vcpu.get_tsc_offset()
    body["cpuid"] = vcpu.cpuid
    body["vcpu_events"] = vcpu.get_vcpu_events()
    return body


@dataclass(frozen=True, slots=True)
class ParsedVcpu:
    """A vCPU's state that was checked and turned into the kernel's structs; nothing of it is set yet."""

    cpuid: list[CpuidEntry]
    cpuid_packed: list[bytes]
    packed: dict[str, bytes]
    xsave: bytes
    nested_state: bytes | None
    msrs: dict[int, int]
    tsc: SavedTsc


def parse_vcpu(vcpu: Vcpu, body: Value) -> ParsedVcpu:
    """Check all of a saved body, which is hostile, before any of it is set: exact keys, types, ranges and lengths.

    Raises :class:`BadField`, or :class:`RestoreRefused` for an XSAVE area that this host's CPU cannot load."""
    where = f"vcpu{vcpu.id}"
    fields = Fields(body, where)
    fields.integer("id", vcpu.id, vcpu.id)
    sregs = "sregs2" if fields.has("sregs2") else "sregs"
    packed = {name: layout(name).pack(fields.mapping(name), f"{where}.{name}") for name in (sregs, *_STRUCTS)}
    packed["lapic_state"] = layout("lapic_state").pack(fields.mapping("lapic"), f"{where}.lapic")
    packed["xcrs"] = parse_xcrs(fields.mapping("xcrs"), f"{where}.xcrs")
    cpuid, cpuid_packed = parse_cpuid(fields.sequence("cpuid", 1024), vcpu.cpuid, f"{where}.cpuid")
    msrs = parse_msrs(fields.mapping("msrs"), f"{where}.msrs")
    nested = fields.blob("nested_state", MAX_NESTED_BYTES) if fields.has("nested_state") else None
    offset = fields.integer("tsc_offset") if fields.has("tsc_offset") else None
    tsc = SavedTsc(fields.integer("tsc_khz", 1, _MAX_KHZ), msrs.get(msr.IA32_TSC, 0), offset)
    xsave = parse_xsave(fields.blob("xsave", 1 << 20), vcpu.host, vcpu.xsave_bytes, f"{where}.xsave")
    fields.done()
    return ParsedVcpu(cpuid, cpuid_packed, packed, xsave, nested, msrs, tsc)


def trim_xcrs(value: dict[str, Value]) -> dict[str, Value]:
    """The extended control registers that there are, of the 16 that the kernel's struct has room for."""
    return value | {"xcrs": value["xcrs"][: value["nr_xcrs"]]}


def parse_xcrs(value: dict[str, Value], where: str) -> bytes:
    """Check what :func:`trim_xcrs` left. Raises :class:`BadField`."""
    fields = Fields(value, where)
    flags = fields.integer("flags", 0, 0)
    nr_xcrs = fields.integer("nr_xcrs", 0, lib.KVM_MAX_XCRS)
    xcrs = fields.sequence("xcrs", nr_xcrs)
    fields.done()
    if len(xcrs) != nr_xcrs:
        raise BadField(f"{where}: nr_xcrs is {nr_xcrs}, but there are {len(xcrs)}")
    whole = xcrs + [{"xcr": 0, "value": 0}] * (lib.KVM_MAX_XCRS - nr_xcrs)
    return layout("xcrs").pack({"nr_xcrs": nr_xcrs, "flags": flags, "xcrs": whole}, where)


_STRUCTS = ("regs", "debugregs", "mp_state", "vcpu_events")


class _Loader:
    """Sets one item after another and judges each; an item that the kernel refuses is refused by name, and the rest is
    set all the same, so that the result tells of everything that is wrong at once."""

    def __init__(self, vcpu: Vcpu, parsed: ParsedVcpu, base: ClockBase) -> None:
        self.vcpu = vcpu
        self.parsed = parsed
        self.base = base
        self.fidelity = Fidelity()
        self.where = f"vcpu{vcpu.id}"

    def step(self, name: str) -> None:
        where = f"{self.where}.{name}"
        try:
            if name in self.parsed.packed:
                self._struct(name, where)
            else:
                getattr(self, f"_{name}")(where)
        except HostError as error:
            self.fidelity.refused(where, None, None, f"the kernel refused it: {error}")

    def _struct(self, name: str, where: str) -> None:
        saved = self.parsed.packed[name]
        self.vcpu.set_packed(name, saved)
        held = self.vcpu.get_packed(name)
        if held == saved:
            self.fidelity.exact(where)
        else:
            self.fidelity.compare(where, layout(name).unpack(saved), layout(name).unpack(held))

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
        """In the form with the PDPTRs; a save without them comes here by :meth:`_struct`."""
        if self.vcpu.host.has_sregs2:
            self._struct("sregs2", where)
        else:
            self.fidelity.refused(where, "sregs2", "sregs", "this host's kernel lacks KVM_CAP_SREGS2")

    def _nested_state(self, where: str) -> None:
        saved = self.parsed.nested_state
        if saved is None:
            return
        size = self.vcpu.host.nested_state_bytes
        if not size:
            self.fidelity.refused(where, len(saved), None, "this host's kernel lacks KVM_CAP_NESTED_STATE")
            return
        self.vcpu.set_nested_state(saved)
        self.fidelity.compare(where, saved, self.vcpu.get_nested_state(size))

    def _xsave(self, where: str) -> None:
        self.vcpu.set_xsave(self.parsed.xsave)
        compare_xsave(self.parsed.xsave, self.vcpu.get_xsave(), self.fidelity, where)

    def _lapic(self, where: str) -> None:
        saved = self.parsed.packed["lapic_state"]
        # Twice: the kernel works out the processor priority before it counts the interrupts in service, so that the
        # first time it is that of none (kvm_apic_set_state: apic_update_ppr() before kvm_apic_update_apicv()).
        self.vcpu.set_packed("lapic_state", saved)
        self.vcpu.set_packed("lapic_state", saved)
        compare_lapic(saved, self.vcpu.get_packed("lapic_state"), self.fidelity, where)

    def _tsc_khz(self, where: str) -> None:
        load_tsc_khz(self.vcpu, self.parsed.tsc.khz, self.fidelity, where)

    def _msrs(self, where: str) -> None:
        load_msrs(self.vcpu, self.parsed.msrs, self.fidelity, where)
        off = load_tsc(self.vcpu, self.parsed.tsc, self.base, self.fidelity, where)
        load_tsc_deadline(self.vcpu, self.parsed.msrs, off, self.fidelity, where)


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
    # The TSC after the other MSRs, TSC_DEADLINE after the TSC.
    "msrs",
    # Last: every step before may change what is pending [fc].
    "vcpu_events",
)
"""The order of a load, which is a rule."""


def load_vcpu(vcpu: Vcpu, parsed: ParsedVcpu, base: ClockBase) -> Fidelity:
    """Set all of a vCPU that has never run in :data:`ORDER`, read every item back and judge it."""
    loader = _Loader(vcpu, parsed, base)
    for name in ORDER:
        loader.step(name)
    return loader.fidelity


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
