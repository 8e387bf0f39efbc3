"""The process groups of a job, and all that a table never sees of them."""
