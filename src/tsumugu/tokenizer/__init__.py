"""Tokenizers: training one, importing one exactly, and the contract by which every later stage knows it."""
