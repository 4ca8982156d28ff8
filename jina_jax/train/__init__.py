"""Training: masked language modelling, pairs and task adapters, on one device or many, resumable to the bit."""
