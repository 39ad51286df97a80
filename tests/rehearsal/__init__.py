"""The whole CUDA path on a machine without a GPU: `cd tests && python -m rehearsal`."""
