"""Files, hashes, processes, signals and safe text; this room knows no diffusion."""
