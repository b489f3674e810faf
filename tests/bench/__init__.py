"""kvmigrate beside QEMU, on this machine, moving and saving the same guest: ``make bench``."""
