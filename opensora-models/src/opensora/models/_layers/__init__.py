"""Layers that several denoisers share. Attribute names are those of the published state dicts."""
