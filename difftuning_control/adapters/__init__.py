"""Adapters of every kind, full weights and ControlNets: started, saved, loaded and taken off."""
