"""Side-by-side timings: this trainer against the scripts that people would otherwise use; see `run`."""
