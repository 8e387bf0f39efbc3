"""Looking at a model at work: where the time of a step goes, and what fills the memory."""

from shardembed.observe.footprint import Memory, memory
from shardembed.observe.timing import Profile, profile

__all__ = ["Memory", "Profile", "memory", "profile"]
