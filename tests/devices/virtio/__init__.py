"""Virtio devices against a driver that is a few lines of Python; no KVM is needed."""
