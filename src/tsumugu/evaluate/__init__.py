"""What a model is worth: its loss on data, its scores on Japanese tasks, its replies to one's own prompts."""
