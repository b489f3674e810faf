"""Planted faults: kvmigrate is broken in a known way, and the oracles must notice; the same runs unbroken must pass."""
