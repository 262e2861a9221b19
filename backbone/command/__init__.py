"""The installed command ``backbone``."""
