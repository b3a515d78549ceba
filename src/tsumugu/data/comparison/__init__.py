"""Comparison: documents that repeat others, and documents that hold a stretch of a benchmark."""
