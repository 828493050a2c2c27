"""The benchmarks users know: `python app.py benchmark --help`; docs/benchmarking.md explains them.

Run where the web framework is not installed: none of it is imported here.
"""
