"""Faults of the link and of either side at every step of a migration: the guest runs in one place, or is resumable."""
