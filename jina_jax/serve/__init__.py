"""The server: the hosted embeddings API on hardware of one's own, all tasks mixed in one batch.

A request goes through `gate` (its id, key, size and log line), `app` and `dialects` (what its client speaks),
`service` (texts to tokens, vectors to the answer) and `batcher` (who goes next, with whom) to `supervisor`, which holds
the process of `worker`, where the model is. Only that process computes, so everything else answers while it does.
"""
