"""Cleaning: characters mended, personal data masked, bad text dropped with a reason."""
