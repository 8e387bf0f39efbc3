"""Using trained tables, straight from a checkpoint: files for others, nearest rows, a map. One process, a block at a time.

`stored` streams a table; all else is built on it.
"""

from shardembed.embeddings.export import Exported, ExportedTable, export_tables
from shardembed.embeddings.nearest import Neighbors, neighbors
from shardembed.embeddings.picture import Map, table_map

__all__ = ["Exported", "ExportedTable", "Map", "Neighbors", "export_tables", "neighbors", "table_map"]
