"""The modules people use: torch's `Embedding` and `EmbeddingBag`, and a collection of many tables with one journey."""

from shardembed.modules.collection import EmbeddingCollection
from shardembed.modules.id_embedding import IdEmbedding
from shardembed.modules.single import Embedding, EmbeddingBag

__all__ = ["Embedding", "EmbeddingBag", "EmbeddingCollection", "IdEmbedding"]
