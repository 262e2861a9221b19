"""Adapters to detector libraries: only a host file imports its library."""
