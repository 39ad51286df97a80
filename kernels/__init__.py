"""Triton device code, one file a family, and the launch tables (`tables/`) that say with which blocks it runs.

The headers count bytes moved through device memory and floating-point operations, and name the bound that governs.
"""
