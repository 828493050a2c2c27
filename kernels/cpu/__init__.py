"""The ops for which torch has something faster on a CPU than the reference, under the same names."""
