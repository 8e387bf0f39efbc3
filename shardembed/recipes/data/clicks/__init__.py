"""Clicks: rows of numbers, ids and lists of ids with a label each, from wherever they come.

`rows` is what a source gives, `reads` that of files; `scan` counts and splits it (`split`, `moments`), `encode` makes
of it what a model takes.
"""
