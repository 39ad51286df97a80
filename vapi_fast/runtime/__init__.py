"""What everything stands on: errors, checkpoints, processes, graphs, clocks, and which packages are there."""
