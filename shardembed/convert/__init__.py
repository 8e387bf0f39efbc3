"""From a plain model to a sharded one."""

from shardembed.convert.shard import shard

__all__ = ["shard"]
