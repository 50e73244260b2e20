"""Benchmarks: what a relayed token costs, how many sessions a core holds, how fast a hang-up gets through."""
