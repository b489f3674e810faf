"""Snapshots of a guest in a directory: :mod:`.save` takes one, :mod:`.load` restores it, :mod:`.inspect` shows it, and
:mod:`.verify` checks it with code of its own.

Nothing is imported here, so that the checker can be loaded without the loader that it checks.
"""
