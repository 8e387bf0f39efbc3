"""Dynamic tables at their owner: which ids have a row, and what a step makes of those that have come."""
