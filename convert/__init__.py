"""File-to-file tools around the checkpoints of jina-embeddings-v3; the only rooms that may import torch."""
