"""Numeric operations: their contract, their specification in plain torch, and their fast forms."""
