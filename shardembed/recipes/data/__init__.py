"""Interactions: made up (`generate`), read from files (`files`), held out and dealt to ranks (`interactions`)."""
