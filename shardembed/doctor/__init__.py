"""Whether an installation can do its work: packages, the machine, and sharded tables against plain ones on its ranks.

Every check gives findings; what is wrong comes with what to do about it.
"""
