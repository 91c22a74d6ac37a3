"""`difftune pilot`: the same training under several schedules, compared on held-out pictures."""
