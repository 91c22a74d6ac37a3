"""The page of `difftune ui`: pictures, training, comparing and runs in a browser."""
