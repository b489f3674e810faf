"""Pages that are sent again as what changed in them: the agreement on it, and the source's bounded cache.

The source says OFFER{features} before its first pages, in a frame that may be skipped; a destination that knows it
answers with an OFFER of those features that it takes. Until then, and with one that is silent, none of them is used.
What a delta run is stands in csrc/api/delta.h and in docs/wire-format.md.
"""

from __future__ import annotations

from typing import Any, Self

from .._core import ffi, lib
from ..errors import BadField, check
from ..record import dataclass
from ..state.frame import FrameKind
from ..state.section import Fields, pack, unpack

DELTA = "delta"
KNOWN = frozenset({DELTA})


@dataclass(frozen=True, slots=True)
class Offer:
    """Features that a side offers to use, or takes."""

    features: tuple[str, ...]

    def to_payload(self) -> bytes:
        """The frame's payload."""
        return pack({"features": list(self.features)})

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Decode a hostile payload. Raises :class:`StreamError`."""
        fields = Fields(unpack(payload, "an OFFER frame"), FrameKind.OFFER.name)
        features = fields.sequence("features", 32)
        fields.done()
        if not all(isinstance(feature, str) for feature in features):
            raise BadField("OFFER: field 'features' holds something that is no name")
        return cls(tuple(str(feature) for feature in features))

    def known(self) -> Offer:
        """Those of the features that this program takes."""
        return Offer(tuple(sorted(KNOWN & {*self.features})))


class DeltaCache:
    """Room for pages as they were last sent, ``size_bytes`` with all that belongs to it, taken as it fills."""

    def __init__(self, size_bytes: int) -> None:
        created = ffi.new("struct kmig_delta **")
        check(lib.kmig_delta_create(size_bytes, created), f"a delta cache of {size_bytes} bytes")
        self.handle: Any = ffi.gc(created[0], lib.kmig_delta_destroy)
