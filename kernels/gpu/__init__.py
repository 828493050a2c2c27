"""The ops in Triton, for NVIDIA GPUs from compute capability 8.0 on, under the contract's names.

Imported at the first call on a GPU (or by tests, which may ask for Triton's interpreter), so that a
machine without a GPU never loads Triton.
"""
