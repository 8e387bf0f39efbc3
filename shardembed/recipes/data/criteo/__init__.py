"""Clicks in files of the Criteo layout: text (`text`), Parquet (`columns`), both by name (`files`), or made up (`planted`)."""
