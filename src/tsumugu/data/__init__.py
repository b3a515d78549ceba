"""From text to token stores, and from token stores to batches."""
