"""Guest RAM: its slots, its pages, and the log of what was written."""
