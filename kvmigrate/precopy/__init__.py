"""Pre-copy rounds into any sink, and the decision when to stop the guest: shared by migration and snapshot."""
