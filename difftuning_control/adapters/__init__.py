"""What is trained: adapters of every kind, full weights, ControlNets; started, saved, loaded and taken off."""
