"""One file a weight format: how a linear layer's weights are stored and multiplied."""
