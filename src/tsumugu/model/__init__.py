"""The Hugging Face module as the model: shapes, building, loading."""
