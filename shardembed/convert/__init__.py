"""From a plain model to a sharded one, and back."""

from shardembed.convert.shard import shard
from shardembed.convert.unshard import unshard

__all__ = ["shard", "unshard"]
