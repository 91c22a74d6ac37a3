"""The page of `difftune ui`: pictures, training, comparing and runs in a browser, by the functions of the other verbs."""
