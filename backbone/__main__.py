"""``python -m backbone`` is the command ``backbone``."""

from backbone.command.app import main

main()
