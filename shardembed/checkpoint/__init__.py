"""Checkpoints: a folder a step, safetensors files of pieces with hashes, a JSON manifest, and nothing pickled.

The format is `blocks` (what there is), `checks` (what must hold) and `manifest` (as JSON). `pieces` writes and reads tensor files.
"""

from shardembed.checkpoint.folders import checkpoints, newest_checkpoint
from shardembed.checkpoint.load import Restored, load_checkpoint
from shardembed.checkpoint.plain import load_plain
from shardembed.checkpoint.save import PendingSave, async_save_checkpoint, save_checkpoint
from shardembed.checkpoint.selection import IdMap

__all__ = [
    "IdMap",
    "PendingSave",
    "Restored",
    "async_save_checkpoint",
    "checkpoints",
    "load_checkpoint",
    "load_plain",
    "newest_checkpoint",
    "save_checkpoint",
]
