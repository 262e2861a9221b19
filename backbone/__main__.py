"""``python -m backbone`` is the command ``backbone``."""

from backbone.cli import main

main()
