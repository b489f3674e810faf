"""What runs inside the emulated host, beside tests of other directories; never collected outside."""
