"""Model families on the one Decoder, and the loader that fills them from a checkpoint."""
