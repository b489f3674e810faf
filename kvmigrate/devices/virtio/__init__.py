"""Virtio devices behind the virtio-mmio transport (virtio 1.2, 4.2): registers in Python, queues in C threads."""
