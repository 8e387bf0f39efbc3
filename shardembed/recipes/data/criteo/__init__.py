"""Clicks in files of the Criteo layout: text (`text`), Parquet (`columns`), both by name (`files`), or made up (`planted`).

`rows` is what they give, `clicks` counts and splits it, `encode` makes of it what a model takes.
"""
