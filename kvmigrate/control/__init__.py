"""The control side of a VM process: its name and socket, QMP, and the session that owns the machine and its job."""
