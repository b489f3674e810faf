"""Addresses as the command line takes them."""

from __future__ import annotations

from pathlib import Path

from ..config import Address
from ..record import replace


def parse_address(text: str) -> Address:
    """As :meth:`Address.parse`, with a path made absolute: the VM's process may have another working directory."""
    address = Address.parse(text)
    return replace(address, path=str(Path(address.path).absolute())) if address.path else address
