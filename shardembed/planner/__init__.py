"""Decides the cut of every table, and proves how far from the best it is. Pure arithmetic: no process group, no weights."""
