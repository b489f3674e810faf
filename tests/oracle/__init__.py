"""The oracles: a guest is moved or saved by real kvmigrate processes, and three independent witnesses must agree.

The heartbeat on the serial port tells from outside that the guest ran exactly once at any time; the ledger inside the
guest checks every page and register against its own books; the digests of all RAM and state are compared by the test.
"""
