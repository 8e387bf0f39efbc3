"""Lookup and update of one slab, on one device, without a process group."""
