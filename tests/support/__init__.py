"""What several tests use: ranks that talk over gloo, tiny models, a small tokenizer and stores."""
