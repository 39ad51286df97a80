"""Triton device code, one file a family of operations; `vapi_fast.ops` launches it."""
