"""Data sets: reading, labels, batches."""
