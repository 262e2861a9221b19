"""One file for each library whose checkpoints are read and written: its names and what tells them apart."""
