"""`difftune export`: a run in the forms that other tools load."""
