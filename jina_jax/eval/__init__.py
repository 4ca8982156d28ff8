"""Evaluation: metrics of retrieval, similarity, classification and clustering, at every Matryoshka size."""
