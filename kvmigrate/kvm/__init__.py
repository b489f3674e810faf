"""The kernel's KVM interface: one file per file descriptor, structs as dicts under the kernel's own field names."""
