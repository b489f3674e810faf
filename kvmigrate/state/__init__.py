"""State as plain values apart from the live objects: sections, their byte frame, and what a restore made of them."""
