"""A second KVM: a whole host that QEMU emulates, with SVM, so that Linux's own kvm_amd runs there.

Its kernel is the distribution's, unmodified; its Python and libraries are this machine's; kvmigrate is installed in it
from a wheel that was built for the purpose. All of it is one initramfs, in memory, gone when the host is switched off.
"""
