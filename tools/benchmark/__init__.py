"""Peers against ours, interleaved in one process, with the machine's roofline."""
