"""The emulated devices: one file each; every device saves and loads its own section of state."""
