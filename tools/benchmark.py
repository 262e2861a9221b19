"""Peers against ours, interleaved in one process; ``--help`` tells how. Its parts are in ``benchmark/``."""

from benchmark.command import app

if __name__ == "__main__":
    app()
