"""The command line. Each verb imports what it needs when it is called, so that ``--help`` answers at once."""
