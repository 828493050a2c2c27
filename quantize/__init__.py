"""Quantization: calibrated, measured, block by block. See docs/quantization.md."""
