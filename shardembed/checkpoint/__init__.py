"""Checkpoints: a folder a step, safetensors files of pieces with hashes, a JSON manifest, and nothing pickled.

`format/` is what lies on the disk, which needs neither a model nor a process group. Beside it: what of a model is saved, and where
it goes when it is loaded.
"""

from shardembed.checkpoint.folders import checkpoints, newest_checkpoint
from shardembed.checkpoint.foreign import Converted, convert_checkpoint
from shardembed.checkpoint.load import Restored, load_checkpoint
from shardembed.checkpoint.plain import load_plain
from shardembed.checkpoint.save import PendingSave, async_save_checkpoint, save_checkpoint
from shardembed.checkpoint.selection import IdMap

__all__ = [
    "Converted",
    "IdMap",
    "PendingSave",
    "Restored",
    "async_save_checkpoint",
    "checkpoints",
    "convert_checkpoint",
    "load_checkpoint",
    "load_plain",
    "newest_checkpoint",
    "save_checkpoint",
]
