"""``python -m kvmigrate`` is the command ``kvmigrate``."""

from .cli.app import main

main()
