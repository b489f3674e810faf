"""Moving a running guest to another process or host: the stream, both sides of it, and the handover."""
