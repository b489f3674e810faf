"""kvmigrate: live migration and snapshots of Linux KVM guests, with evidence that nothing was lost."""
