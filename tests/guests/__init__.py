"""The guests themselves: that they run, and that the ledger guest notices whatever is done to it."""
